/* What is said around the data set of a C-STORE: the request before it (PS3.7 9.3.1.1), the response after it (PS3.7
   9.3.1.2), and the meta information of the file (PS3.10 7.1). `pdata` and `part10` say the same in Python. */

#include <string.h>

#include "native.h"

enum { ELEMENT_HEAD = 8 };
enum { GROUP_LENGTH = 0x0000, SOP_CLASS_UID = 0x0002, COMMAND_FIELD = 0x0100, MESSAGE_ID = 0x0110 };
enum { MESSAGE_ID_RESPONDED_TO = 0x0120, DATA_SET_TYPE = 0x0800, STATUS = 0x0900, SOP_INSTANCE_UID = 0x1000 };
enum { C_STORE_RQ = 0x0001, C_STORE_RSP = 0x8001, NO_DATA_SET = 0x0101, SUCCESS = 0 };
enum { META_HEAD = 144, LEAST_LEAD = 640 }; /* as in part10 */

static uint16_t number_at(const uint8_t *at) { return (uint16_t)(at[0] | at[1] << 8); }

static uint8_t *put_number(uint8_t *at, uint32_t number, int size) {
    for (int each = 0; each < size; each++)
        *at++ = (uint8_t)(number >> 8 * each);
    return at;
}

static uint8_t *put_big_endian(uint8_t *at, uint32_t number) {
    for (int shift = 24; shift >= 0; shift -= 8)
        *at++ = (uint8_t)(number >> shift);
    return at;
}

static uint8_t *put(uint8_t *at, const uint8_t *bytes, size_t length) {
    memcpy(at, bytes, length);
    return at + length;
}

static uint8_t *put_uid(uint8_t *at, const struct uid *uid) {
    at = put(at, uid->at, uid->length);
    if (uid->length % 2)
        *at++ = 0;
    return at;
}

/* -- command sets: Implicit VR Little Endian ----------------------------------------------------------------------- */

/* Read a value; return whether it may name something: digits and dots, and nothing else but what pads it. */
int dicom_node_uid(const uint8_t *value, size_t length, struct uid *uid) {
    while (length && (!value[length - 1] || value[length - 1] == ' '))
        length--;
    *uid = (struct uid){value, length};
    for (size_t each = 0; each < length; each++)
        if (!((value[each] >= '0' && value[each] <= '9') || (value[each] == '.' && each && value[each - 1] != '.')))
            return 0;
    return length && length <= LONGEST_UID;
}

/* Understand a command set; return whether it is that of a C-STORE request with a data set, and names that can be. */
int dicom_node_request(const uint8_t *command, size_t length, struct request *request) {
    const uint8_t *at = command, *end = command + length;
    int is_store = 0, has_data_set = 0, has_message_id = 0, has_class = 0, has_instance = 0;
    *request = (struct request){0};
    while (end - at >= ELEMENT_HEAD) {
        uint16_t group = number_at(at), element = number_at(at + 2);
        uint32_t size = number_at(at + 4) | (uint32_t)number_at(at + 6) << 16;
        const uint8_t *value = at + ELEMENT_HEAD;
        if (group || size > (size_t)(end - value))
            return 0;
        if (element == SOP_CLASS_UID)
            has_class = dicom_node_uid(value, size, &request->sop_class);
        else if (element == SOP_INSTANCE_UID)
            has_instance = dicom_node_uid(value, size, &request->sop_instance);
        else if (element == COMMAND_FIELD)
            is_store = size == 2 && number_at(value) == C_STORE_RQ;
        else if (element == DATA_SET_TYPE)
            has_data_set = size != 2 || number_at(value) != NO_DATA_SET;
        else if (element == MESSAGE_ID) {
            has_message_id = size == 2;
            request->message_id = size == 2 ? number_at(value) : 0;
        }
        at = value + size;
    }
    return at == end && is_store && has_data_set && has_message_id && has_class && has_instance;
}

static uint8_t *put_head(uint8_t *at, uint16_t element, size_t length) {
    return put_number(put_number(put_number(at, 0, 2), element, 2), (uint32_t)length, 4);
}

static uint8_t *put_us(uint8_t *at, uint16_t element, uint16_t value) {
    return put_number(put_head(at, element, 2), value, 2);
}

static uint8_t *put_name(uint8_t *at, uint16_t element, const struct uid *uid) {
    return put_uid(put_head(at, element, uid->length + uid->length % 2), uid);
}

/* Write the response that all is well, one P-DATA-TF of at most 256 bytes, and return its length. */
size_t dicom_node_answer(const struct request *request, uint8_t context_id, uint8_t *into) {
    uint8_t *body = into + PDU_HEAD + PDV_HEAD + ELEMENT_HEAD + 4;
    uint8_t *end = put_name(body, SOP_CLASS_UID, &request->sop_class);
    end = put_us(end, COMMAND_FIELD, C_STORE_RSP);
    end = put_us(end, MESSAGE_ID_RESPONDED_TO, request->message_id);
    end = put_us(end, DATA_SET_TYPE, NO_DATA_SET);
    end = put_us(end, STATUS, SUCCESS);
    end = put_name(end, SOP_INSTANCE_UID, &request->sop_instance);
    uint32_t length = (uint32_t)(end - body), command = length + ELEMENT_HEAD + 4;
    uint8_t *at = into;
    *at++ = P_DATA_TF;
    *at++ = 0;
    at = put_big_endian(put_big_endian(at, command + PDV_HEAD), command + 2);
    *at++ = context_id;
    *at++ = COMMAND | LAST;
    put_number(put_head(at, GROUP_LENGTH, 4), length, 4);
    return (size_t)(end - into);
}

/* -- meta information: Explicit VR Little Endian -------------------------------------------------------------------- */

/* Return whether there is room for these elements before a data set, whatever its name is. */
int dicom_node_has_room(const struct around *around) {
    return around->before_length + around->behind_length <= LEAST_LEAD - META_HEAD - ELEMENT_HEAD - LONGEST_UID - 4 - DIGEST;
}

/* Write what stands before a data set of `expected` bytes, and return its length; the digest is to be its end. */
size_t dicom_node_lead(const struct around *around, const struct uid *sop_instance, size_t expected, uint8_t *into) {
    static const uint8_t prefix[] = "DICM\x02\0\0\0UL\x04", instance_head[] = "\x02\0\x03\0UI";
    size_t zeros = expected ? (-(LEAST_LEAD + expected)) % DISK_BLOCK & ~(size_t)1 : 0, lead = LEAST_LEAD + zeros;
    memset(into, 0, lead);
    put_number(put(into + 128, prefix, 12), (uint32_t)(lead - META_HEAD), 4);
    uint8_t *at = put(into + META_HEAD, around->before, around->before_length);
    at = put_number(put(at, instance_head, 6), (uint32_t)(sop_instance->length + sop_instance->length % 2), 2);
    at = put(put_uid(at, sop_instance), around->behind, around->behind_length);
    put_number(at, (uint32_t)(into + lead - at - 4), 4);
    return lead;
}
