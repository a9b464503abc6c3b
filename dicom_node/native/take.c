/* Instances as nine hundred and ninety-nine of a thousand are: from the connection to the disk, acknowledged, one after
   another, in one wait without the interpreter's lock. They are acknowledged where Python would acknowledge them; where
   anything has to be thought about, it is left as it came, and Python thinks about it. */

#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>

#include "native.h"

/* C-STOREs of one association that are like one another: of one SOP class, in one presentation context. */
struct run {
    uint8_t *memory; /* begins at a block's boundary; each file goes through it, with what stands before its data set */
    size_t size;
    uint8_t *ahead; /* for the beginning of the next message */
    size_t ahead_size;
    const uint8_t *command; /* of the first, which has been read */
    size_t command_length;
    struct around around;
    const uint32_t *wanted; /* elements, and room for where they are; as in dicom_node_scan */
    int64_t *found;
    const int32_t *files; /* empty and open, one for each instance */
    uint8_t *told;        /* room for what is to be known of each that has landed */
    size_t expected;      /* bytes of the next data set, perhaps; 0: nobody knows */
    size_t filled;        /* bytes of the present data set */
    ssize_t has;          /* bytes that lie ahead; -1: there will be none */
    int32_t number;       /* of elements that are wanted */
    int32_t most;         /* instances */
    int32_t landed;       /* instances */
    int32_t linger;       /* ms in which the next message has to begin */
    int32_t is_implicit;
};

/* What is known of an instance that has landed; `values` bytes of elements follow, each a tag, a length and a value. */
struct told {
    uint64_t size; /* bytes of the data set */
    uint32_t lead; /* bytes before it */
    uint32_t values;
    uint8_t digest[DIGEST];
};

enum { PIXEL_DATA_GROUP = 0x7FE00000, TOLD = 2048, LONGEST_ANSWER = 256 };
/* ns: after so long Python is told what has landed, whether something comes or nothing does */
static const int64_t TOLD_AFTER = 100000000, LONGEST_WAIT = 1000000000;
static const uint32_t UNDEFINED = 0xFFFFFFFF;
static const uint32_t SOP_CLASS_UID = 0x00080016, SOP_INSTANCE_UID = 0x00080018;
static const uint32_t STUDY_INSTANCE_UID = 0x0020000D, SERIES_INSTANCE_UID = 0x0020000E;

/* Return whether an element of a data set is there and holds what may name an instance: `named`, if there is that. */
static int is_uid(const int64_t *found, int count, const uint8_t *data_set, uint32_t tag, const struct uid *named) {
    for (const int64_t *place = found; place < found + 4 * count; place += 4) {
        if (place[0] != tag)
            continue;
        struct uid uid;
        return dicom_node_uid(data_set + place[2], (size_t)place[3], &uid) &&
               (!named || (named->length == uid.length && !memcmp(named->at, uid.at, uid.length)));
    }
    return 0;
}

/* Write down what was found in a data set, all but its pixel data; return how many bytes that is, 0 where it is more
   than there is room for. */
static uint32_t tell(const int64_t *found, int count, const uint8_t *data_set, uint8_t *into) {
    uint8_t *at = into;
    for (const int64_t *place = found; place < found + 4 * (count - 1); place += 4) {
        uint32_t head[2] = {(uint32_t)place[0], (uint32_t)place[3]};
        if (head[1] > TOLD - sizeof(struct told) - sizeof head - (size_t)(at - into))
            return 0;
        memcpy(at, head, sizeof head);
        memcpy(at + sizeof head, data_set + place[2], head[1]);
        at += sizeof head + head[1];
        if ((size_t)(at - into) > TOLD - sizeof(struct told) - sizeof head)
            return 0;
    }
    return (uint32_t)(at - into);
}

/* Return whether a data set is what the request said, names itself, and is all there up to the end of its pixel data;
   what it says is told then. */
static int is_in_order(const struct run *run, const struct request *request, const uint8_t *data_set, struct told *told) {
    int64_t *found = run->found;
    int count = dicom_node_scan(data_set, run->filled, run->is_implicit, run->wanted, run->number, PIXEL_DATA_GROUP, 0,
                                found);
    if (count <= 0)
        return 0;
    const int64_t *last = found + 4 * (count - 1);
    uint64_t length = last[3] == UNDEFINED ? 0 : (uint64_t)last[3];
    if (last[0] < PIXEL_DATA_GROUP || (uint64_t)last[2] + length > run->filled)
        return 0;
    told->values = tell(found, count, data_set, (uint8_t *)(told + 1));
    return told->values && is_uid(found, count, data_set, SOP_CLASS_UID, &request->sop_class) &&
           is_uid(found, count, data_set, SOP_INSTANCE_UID, &request->sop_instance) &&
           is_uid(found, count, data_set, STUDY_INSTANCE_UID, NULL) &&
           is_uid(found, count, data_set, SERIES_INSTANCE_UID, NULL);
}

/* Read a data set and, where nothing about it is out of the ordinary, digest it, land it and answer: it has landed then,
   LANDED, or GONE where only the answer failed. Anything else as dicom_node_fragments, and so many bytes are `filled`. */
static int take_one(struct flow *flow, struct run *run, const struct request *request) {
    uint8_t answer[LONGEST_ANSWER];
    struct told *told = (struct told *)(run->told + (size_t)run->landed * TOLD);
    size_t lead = dicom_node_lead(&run->around, &request->sop_instance, run->expected, run->memory);
    uint8_t *data_set = run->memory + lead;
    run->filled = 0;
    int reason = dicom_node_fragments(flow, data_set, run->size - lead, &run->filled);
    if (reason != WHOLE || run->filled < SHORTEST_DIGESTED || !is_in_order(run, request, data_set, told))
        return reason;
    told->size = run->filled;
    told->lead = (uint32_t)lead;
    dicom_node_digest(data_set, run->filled, told->digest);
    memcpy(data_set - DIGEST, told->digest, DIGEST);
    size_t length = dicom_node_answer(request, flow->context_id, answer);
    int wrong = dicom_node_land(run->files[run->landed], run->memory, lead + run->filled, flow->connection, answer, length);
    if (wrong > 0)
        return WHOLE;
    run->landed++;
    run->expected = run->filled;
    run->has = 0;
    return wrong ? GONE : LANDED;
}

/* Read the beginning of the next message, if it comes in time; return whether it is a C-STORE request like the others,
   all of it in the present presentation context. It lies ahead in any case. */
static int goes_on(struct flow *flow, struct run *run, struct request *request) {
    const struct uid before = request->sop_class; /* its bytes are Python's */
    run->has = dicom_node_exchange(flow->connection, NULL, 0, run->linger, run->ahead, run->ahead_size);
    const uint8_t *ahead = run->ahead;
    if (run->has < PDU_HEAD + PDV_HEAD || ahead[0] != P_DATA_TF)
        return 0;
    uint32_t in_pdu = dicom_node_big_endian(ahead + 2), value = dicom_node_big_endian(ahead + PDU_HEAD);
    if (in_pdu > flow->longest_pdu || ahead[10] != flow->context_id || ahead[11] != (COMMAND | LAST) || value < 2 ||
        (size_t)run->has != PDU_HEAD + 4 + (size_t)value)
        return 0;
    if (!dicom_node_request(ahead + PDU_HEAD + PDV_HEAD, value - 2, request) ||
        request->sop_class.length != before.length || memcmp(request->sop_class.at, before.at, before.length))
        return 0;
    request->sop_class = before; /* the next message is read to where this one is */
    flow->in_pdu = in_pdu - 4 - value;
    flow->deadline = dicom_node_now() + flow->timeout;
    flow->left = flow->is_last = flow->has = 0;
    return 1;
}

static void limit_waits(int connection, int64_t longest) {
    struct timeval time = {.tv_sec = longest / 1000000000, .tv_usec = longest % 1000000000 / 1000};
    setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time);
}

/* Take an instance whose request has been read, and those that follow it, for as long as they are like it, there are
   files for them, and Python need not look. LANDED: all that was begun is acknowledged, and `has` bytes of the next
   message lie ahead. Anything else as dicom_node_fragments, of the one after those that have landed: `filled` bytes of
   it are behind a lead of its own, and its request, all of it, lies ahead unless it is the first. */
int dicom_node_take(struct flow *flow, struct run *run) {
    int64_t until = dicom_node_now() + TOLD_AFTER;
    struct request request;
    run->landed = 0;
    run->filled = 0;
    run->has = 0;
    if (!dicom_node_request(run->command, run->command_length, &request) || !dicom_node_has_room(&run->around))
        return PROGRESS;
    limit_waits(flow->connection, flow->timeout < LONGEST_WAIT ? flow->timeout : LONGEST_WAIT);
    int reason;
    do reason = take_one(flow, run, &request);
    while (reason == LANDED && run->landed < run->most && !flow->in_pdu && dicom_node_now() < until &&
           goes_on(flow, run, &request));
    limit_waits(flow->connection, flow->timeout);
    return run->has < 0 ? GONE : reason;
}
