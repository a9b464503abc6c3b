/* Where the elements of a data set lie (PS3.5 Section 7): `dicom_node.elements.scan`, for data sets that have nothing
   wrong with them. At anything else it gives up, and Python says what is wrong. */

#include <string.h>

#include "native.h"

enum { SEQUENCE, ITEM, DEEPEST = 64 };                  /* what is open, and how many of them at most */
enum { NOTHING, EXPLICIT, IMPLICIT, BYTES };            /* what is in the items of a sequence */
enum { GIVE_UP = -1, MOST_ELEMENTS = 1000000, MOST_INSIDE = 10000000 };
static const uint32_t UNDEFINED = 0xFFFFFFFF, ITEM_TAG = 0xFFFEE000, ITEM_END = 0xFFFEE00D, SEQUENCE_END = 0xFFFEE0DD;

struct reader {
    const uint8_t *content;
    uint64_t at, end;
};

struct head {
    uint32_t tag, length;
    char vr[2];
};

static uint32_t little_endian(const uint8_t *at, int size) {
    uint32_t value = 0;
    for (int each = 0; each < size; each++)
        value |= (uint32_t)at[each] << 8 * each;
    return value;
}

/* Return how many bytes stand before a value of this VR; 0 where there is no such VR (PS3.5 7.1.2). */
static int head_size(const uint8_t *vr) {
    static const char shorts[] = "AEASATCSDADSDTFDFLISLOLTPNSHSLSSSTTMUIULUS", longs[] = "OBODOFOLOVOWSQSVUCUNURUTUV";
    for (const char *each = shorts; *each; each += 2)
        if (each[0] == vr[0] && each[1] == vr[1])
            return 8;
    for (const char *each = longs; *each; each += 2)
        if (each[0] == vr[0] && each[1] == vr[1])
            return 12;
    return 0;
}

/* Read the head of the next element, and go on to its value; return 0 where there is none that could be read. */
static int read_head(struct reader *reader, int is_implicit, struct head *head) {
    const uint8_t *at = reader->content + reader->at;
    uint64_t left = reader->end - reader->at;
    if (reader->at > reader->end || left < 8)
        return 0;
    head->tag = little_endian(at, 2) << 16 | little_endian(at + 2, 2);
    int size = is_implicit ? 8 : head_size(at + 4);
    if (!size || left < (uint64_t)size)
        return 0;
    memcpy(head->vr, is_implicit ? (const uint8_t *)"\0\0" : at + 4, 2);
    head->length = is_implicit ? little_endian(at + 4, 4) : size == 8 ? little_endian(at + 6, 2) : little_endian(at + 8, 4);
    reader->at += (uint64_t)size;
    return 1;
}

/* Return what a value of undefined length is made of; one of UN has no VRs, whatever is around it (PS3.5 6.2.2). */
static int contents(const char *vr, int is_implicit) {
    if (is_implicit || !memcmp(vr, "UN", 2))
        return IMPLICIT;
    return !memcmp(vr, "SQ", 2) ? EXPLICIT : !memcmp(vr, "OB", 2) || !memcmp(vr, "OW", 2) ? BYTES : NOTHING;
}

/* Go on to where a value of undefined length ends; return 0 where that cannot be found. */
static int skip_items(struct reader *reader, int inside) {
    uint8_t kind[DEEPEST] = {SEQUENCE}, made_of[DEEPEST] = {(uint8_t)inside};
    int open = inside == NOTHING ? -1 : 1;
    for (long each = 0; open > 0 && open < DEEPEST && each < MOST_INSIDE; each++) {
        struct head head;
        int is_sequence = kind[open - 1] == SEQUENCE, of = made_of[open - 1];
        int is_delimiter = reader->end - reader->at >= 2 && little_endian(reader->content + reader->at, 2) == 0xFFFE;
        if (is_sequence || is_delimiter) {
            if (!read_head(reader, 1, &head))
                return 0;
            if (head.tag == (is_sequence ? SEQUENCE_END : ITEM_END) && !head.length) {
                open--;
                continue;
            }
            if (head.tag != ITEM_TAG || !is_sequence || (of == BYTES && head.length == UNDEFINED))
                return 0;
            kind[open] = ITEM;
            made_of[open] = (uint8_t)of;
        } else {
            if (!read_head(reader, of == IMPLICIT, &head))
                return 0;
            kind[open] = SEQUENCE;
            made_of[open] = head.length == UNDEFINED ? (uint8_t)contents(head.vr, of == IMPLICIT) : NOTHING;
            if (head.length == UNDEFINED && made_of[open] == NOTHING)
                return 0;
        }
        if (head.length == UNDEFINED)
            open++;
        else if (head.length > reader->end - reader->at)
            return 0;
        else
            reader->at += head.length;
    }
    return open == 0;
}

/* Find the `wanted` elements, whose tags ascend: four numbers for each that is there go to `found`, its tag, its VR
   (two letters, the first in the lower byte), the offset of its value and its length. Return how many; -1 to give up. */
int dicom_node_scan(const uint8_t *content, uint64_t size, int is_implicit, const uint32_t *wanted, int number,
                    uint64_t stop_at, int is_whole, int64_t *found) {
    struct reader reader = {content, 0, size};
    struct head head;
    int64_t before = -1;
    int next = 0, count = 0;
    if (!number || (is_implicit && size >= 6 && head_size(content + 4)))
        return GIVE_UP;
    for (long each = 0; each < MOST_ELEMENTS && reader.at < size; each++) {
        if (!read_head(&reader, is_implicit, &head) || head.tag <= before || head.tag >> 16 == 0xFFFE)
            return GIVE_UP;
        if (head.tag > wanted[number - 1])
            return count;
        while (next < number && wanted[next] < head.tag)
            next++;
        uint64_t start = reader.at, length = head.length;
        if (head.tag < stop_at) {
            if (head.length == UNDEFINED) {
                if (!skip_items(&reader, contents(head.vr, is_implicit)))
                    return GIVE_UP;
                length = reader.at - start - 8;
            } else if (length > size - start)
                return GIVE_UP;
            else
                reader.at += length;
        }
        if (wanted[next] == head.tag) {
            int64_t *place = found + 4 * count++;
            place[0] = head.tag;
            place[1] = (uint8_t)head.vr[0] | (uint8_t)head.vr[1] << 8;
            place[2] = (int64_t)start;
            place[3] = (int64_t)length;
        }
        if (head.tag >= stop_at)
            return count;
        before = head.tag;
    }
    return is_whole && reader.at >= size ? count : GIVE_UP;
}
