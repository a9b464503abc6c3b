/* An instance as nine hundred and ninety-nine of a thousand are: from the connection to the disk, acknowledged, in one
   wait without the interpreter's lock. It is acknowledged where Python would acknowledge it; where anything has to be
   thought about, it is left as it came, and Python thinks about it. */

#include <string.h>

#include "native.h"

/* An instance, in memory that begins at a block's boundary with what stands before its data set in the file: `lead`
   bytes, the last of which are for the digest. */
struct instance {
    uint8_t *memory;
    size_t size; /* of the memory */
    size_t lead;
    const char *sop_class_uid, *sop_instance_uid; /* as the request has them, without padding */
    size_t class_length, instance_length;
    const uint32_t *wanted; /* elements; as in dicom_node_scan */
    int64_t *found;
    const uint8_t *answer; /* that all is well */
    size_t length;         /* of the answer */
    int32_t number;        /* of elements that are wanted */
    int32_t count;         /* of elements that were found */
    int32_t is_implicit;
    int32_t file;
    int32_t is_answered;
};

enum { PIXEL_DATA_GROUP = 0x7FE00000, LONGEST_UID = 64 };
static const uint32_t UNDEFINED = 0xFFFFFFFF;
static const uint32_t SOP_CLASS_UID = 0x00080016, SOP_INSTANCE_UID = 0x00080018;
static const uint32_t STUDY_INSTANCE_UID = 0x0020000D, SERIES_INSTANCE_UID = 0x0020000E;

/* Return whether an element is there and holds what may name an instance: `named`, if that is not null. */
static int is_uid(const struct instance *instance, uint32_t tag, const char *named, size_t named_length) {
    for (const int64_t *place = instance->found; place < instance->found + 4 * instance->count; place += 4) {
        if (place[0] != tag)
            continue;
        const uint8_t *value = instance->memory + instance->lead + place[2];
        size_t length = (size_t)place[3], each = 0;
        while (length && (!value[length - 1] || value[length - 1] == ' '))
            length--;
        for (; each < length; each++)
            if (!((value[each] >= '0' && value[each] <= '9') || (value[each] == '.' && each && value[each - 1] != '.')))
                return 0;
        return length && length <= LONGEST_UID && (!named || (named_length == length && !memcmp(named, value, length)));
    }
    return 0;
}

/* Return whether a data set is what the request said, names itself, and is all there up to the end of its pixel data. */
static int is_in_order(struct instance *instance, size_t size) {
    instance->count = dicom_node_scan(instance->memory + instance->lead, size, instance->is_implicit, instance->wanted,
                                      instance->number, PIXEL_DATA_GROUP, 0, instance->found);
    if (instance->count <= 0)
        return 0;
    const int64_t *last = instance->found + 4 * (instance->count - 1);
    uint64_t length = last[3] == UNDEFINED ? 0 : (uint64_t)last[3];
    return last[0] >= PIXEL_DATA_GROUP && (uint64_t)last[2] + length <= size &&
           is_uid(instance, SOP_CLASS_UID, instance->sop_class_uid, instance->class_length) &&
           is_uid(instance, SOP_INSTANCE_UID, instance->sop_instance_uid, instance->instance_length) &&
           is_uid(instance, STUDY_INSTANCE_UID, NULL, 0) && is_uid(instance, SERIES_INSTANCE_UID, NULL, 0);
}

/* Read a data set and, where nothing about it is out of the ordinary, digest it, land it and answer: LANDED. Anything
   else as dicom_node_fragments; `*filled` bytes lie behind the lead then, and Python goes on from there. */
int dicom_node_take(struct flow *flow, struct instance *instance, size_t *filled) {
    uint8_t *data_set = instance->memory + instance->lead;
    int reason = dicom_node_fragments(flow, data_set, instance->size - instance->lead, filled);
    if (reason != WHOLE || *filled < SHORTEST_DIGESTED || !is_in_order(instance, *filled))
        return reason;
    dicom_node_digest(data_set, *filled, data_set - DIGEST);
    int wrong = dicom_node_land(instance->file, instance->memory, instance->lead + *filled, flow->connection,
                                instance->answer, instance->length);
    instance->is_answered = !wrong;
    return wrong <= 0 ? LANDED : WHOLE;
}
