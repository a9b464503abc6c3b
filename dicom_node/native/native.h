/* What the sources of the library know of each other; each says at its function what that does. */

#ifndef DICOM_NODE_NATIVE_H
#define DICOM_NODE_NATIVE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum { GONE = -1, LATE = -2, VIOLATION = -3, PROGRESS = 0, FULL = 1, WHOLE = 2, LANDED = 3, UNSENT = -4 };
enum { P_DATA_TF = 0x04, PDU_HEAD = 6, PDV_HEAD = 6, COMMAND = 1, LAST = 2 }; /* PS3.8 9.3.5, E.2 */
enum { DISK_BLOCK = 4096, DIGEST = 16, SHORTEST_DIGESTED = 241, LONGEST_UID = 64 }; /* bytes */

/* Where in its PDUs and fragments a data set is; Python sets it, and looks at `in_pdu` when the data set is whole. */
struct flow {
    int64_t timeout; /* ns that a PDU may take */
    uint32_t longest_pdu;
    int32_t connection;
    uint32_t in_pdu;    /* bytes of the present PDU that are still to be read, the head below not among them */
    uint32_t left;      /* bytes of the present fragment that are still to be read */
    uint8_t context_id; /* of the presentation context that all fragments have to have */
    uint8_t is_last;    /* whether the present fragment is */
    uint8_t has;        /* bytes of the next head that have been read */
    uint8_t head[12];   /* of a PDU, and of a PDV */
    int64_t deadline;   /* ns */
};

/* A UID, without the byte that pads it. */
struct uid {
    const uint8_t *at;
    size_t length;
};

/* A C-STORE request (PS3.7 9.3.1.1). */
struct request {
    struct uid sop_class, sop_instance;
    uint16_t message_id;
};

/* Elements of the meta information of files that are alike: those before and behind Media Storage SOP Instance UID, the
   last without the length of its value, which ends with the digest. */
struct around {
    const uint8_t *before, *behind;
    size_t before_length, behind_length;
};

int64_t dicom_node_now(void);
uint32_t dicom_node_big_endian(const uint8_t *at);
ssize_t dicom_node_exchange(int connection, const uint8_t *answer, size_t length, int milliseconds, uint8_t *into,
                            size_t size);
int dicom_node_fragments(struct flow *flow, uint8_t *room, size_t size, size_t *filled);
int dicom_node_land(int file, const uint8_t *content, size_t size, int connection, const uint8_t *answer,
                    size_t length);
int dicom_node_scan(const uint8_t *content, uint64_t size, int is_implicit, const uint32_t *wanted, int number,
                    uint64_t stop_at, int is_whole, int64_t *found);
void dicom_node_digest(const uint8_t *content, size_t size, uint8_t *digest);
int dicom_node_uid(const uint8_t *value, size_t length, struct uid *uid);
int dicom_node_request(const uint8_t *command, size_t length, struct request *request);
size_t dicom_node_answer(const struct request *request, uint8_t context_id, uint8_t *into);
int dicom_node_has_room(const struct around *around);
size_t dicom_node_lead(const struct around *around, const struct uid *sop_instance, size_t expected, uint8_t *into);

#endif
