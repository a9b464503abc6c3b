/* The bytes of a C-STORE, from the connection to the disk, without a return to Python in between.

   Nothing is decided here. What is not as it is in nine hundred and ninety-nine of a thousand instances is left where
   it is, and Python, which can do all of it, goes on from there. What may wait is called without the interpreter's
   lock; nothing keeps anything, allocates anything, or reads a byte of the connection that it does not give back. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "native.h"

enum { PAUSED = -9 };

int dicom_node_version(void) { return 7; } /* changes with any argument or field: Python asks before it calls */

int64_t dicom_node_now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000LL + at.tv_nsec;
}

uint32_t dicom_node_big_endian(const uint8_t *at) {
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

/* Read so many bytes, if they come in time; return how many have, -1 where there are none and will be none. */
static ssize_t read_until(int64_t until, int connection, uint8_t *into, size_t size) {
    size_t got = 0;
    while (got < size) {
        ssize_t piece = recv(connection, into + got, size - got, MSG_DONTWAIT);
        if (piece > 0) {
            got += (size_t)piece;
            continue;
        }
        if (!piece || (errno != EINTR && errno != EAGAIN && errno != EWOULDBLOCK))
            return got ? (ssize_t)got : -1;
        struct pollfd waiting = {.fd = connection, .events = POLLIN};
        int64_t left = until - dicom_node_now();
        struct timespec time = {.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};
        if (errno != EINTR && (left <= 0 || !ppoll(&waiting, 1, &time, NULL)))
            break;
    }
    return (ssize_t)got;
}

static int send_all(int connection, const uint8_t *answer, size_t length) {
    for (ssize_t sent; length; answer += sent, length -= (size_t)sent) {
        do sent = send(connection, answer, length, MSG_NOSIGNAL); while (sent < 0 && errno == EINTR);
        if (sent < 0)
            return UNSENT;
    }
    return 0;
}

/* Answer the message before, unless that has been done, and read the beginning of the next, as far as it comes within
   so many milliseconds: the head of a PDU and, where that is a P-DATA-TF with a fragment of a command set that fits, that
   fragment. Return how many bytes there are; 0 where none came in time, -1 where there will be none. */
ssize_t dicom_node_exchange(int connection, const uint8_t *answer, size_t length, int milliseconds, uint8_t *into,
                            size_t size) {
    if (send_all(connection, answer, length))
        return -1;
    int64_t until = dicom_node_now() + milliseconds * 1000000LL;
    ssize_t got = read_until(until, connection, into, PDU_HEAD);
    if (got < PDU_HEAD)
        return got;
    uint32_t in_pdu = dicom_node_big_endian(into + 2);
    if (into[0] != P_DATA_TF || in_pdu < PDV_HEAD)
        return got;
    ssize_t more = read_until(until, connection, into + PDU_HEAD, PDV_HEAD);
    if (more < PDV_HEAD)
        return got + (more > 0 ? more : 0);
    got += more;
    uint32_t value = dicom_node_big_endian(into + PDU_HEAD);
    if (value < 2 || value > in_pdu - 4 || value - 2 > size - (size_t)got || !(into[got - 1] & COMMAND))
        return got;
    more = read_until(until, connection, into + got, value - 2);
    return got + (more > 0 ? more : 0);
}

/* Return the length of the next head: that of its PDU comes first where the present one ends. */
static uint8_t next_head(const struct flow *flow) { return flow->in_pdu ? PDV_HEAD : PDU_HEAD + PDV_HEAD; }

/* Read what is left of a fragment into `room`, `size` bytes of it, and then so many bytes of the head behind it. Return
   0, GONE, LATE, or PAUSED where some of it has not come for as long as the kernel waits, and may be waited for again. */
static int fill(struct flow *flow, uint8_t *room, size_t size, size_t *filled, uint8_t head) {
    struct iovec pieces[2] = {{room, size}, {flow->head + flow->has, head}};
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = 2};
    ssize_t got;
    do got = recvmsg(flow->connection, &message, MSG_WAITALL); while (got < 0 && errno == EINTR);
    if (!got || (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK))
        return GONE;
    size_t come = got < 0 ? 0 : (size_t)got, of_room = come < size ? come : size;
    *filled += of_room;
    flow->left -= (uint32_t)of_room;
    flow->has += (uint8_t)(come - of_room);
    return come == size + head ? 0 : dicom_node_now() > flow->deadline ? LATE : PAUSED;
}

/* Make the head that has been read that of the present fragment. Return 0 or VIOLATION. */
static int begin_fragment(struct flow *flow) {
    const uint8_t *head = flow->head;
    if (flow->has > PDV_HEAD) {
        uint32_t length = dicom_node_big_endian(head + 2);
        if (head[0] != P_DATA_TF || length < PDV_HEAD || length > flow->longest_pdu)
            return VIOLATION; /* an A-ABORT, or a broken sender */
        flow->in_pdu = length;
        flow->deadline = dicom_node_now() + flow->timeout;
        head += PDU_HEAD;
    }
    uint32_t length = dicom_node_big_endian(head);
    flow->has = 0;
    if (flow->in_pdu < PDV_HEAD || length < 2 || length - 2 > flow->in_pdu - PDV_HEAD)
        return VIOLATION;
    if (head[4] != flow->context_id || head[5] & COMMAND)
        return VIOLATION;
    flow->left = length - 2;
    flow->in_pdu -= PDV_HEAD + flow->left;
    flow->is_last = head[5] & LAST;
    return 0;
}

/* Read the fragments of a data set into `room` from `*filled` on, side by side. Return WHOLE at its end, FULL where
   the room is, PROGRESS where this has taken a second or the kernel will not wait, or GONE, LATE, VIOLATION. */
int dicom_node_fragments(struct flow *flow, uint8_t *room, size_t size, size_t *filled) {
    int64_t until = dicom_node_now() + 1000000000LL;
    for (;;) {
        int wrong = 0;
        if (flow->left) {
            size_t take = flow->left < size - *filled ? flow->left : size - *filled;
            if (!take)
                return FULL;
            uint8_t head = take < flow->left || flow->is_last ? 0 : next_head(flow);
            wrong = fill(flow, room + *filled, take, filled, head);
        } else {
            if (flow->is_last)
                return WHOLE;
            uint8_t head = (uint8_t)(next_head(flow) - flow->has);
            if (head)
                wrong = fill(flow, room, 0, filled, head);
            if (!wrong)
                wrong = begin_fragment(flow);
            if (!wrong && flow->left && dicom_node_now() > until)
                return PROGRESS;
        }
        if (wrong)
            return wrong == PAUSED ? PROGRESS : wrong;
    }
}

static int write_all(int file, const uint8_t *content, size_t size, off_t at) {
    ssize_t written;
    do written = pwrite(file, content, size, at); while (written < 0 && errno == EINTR);
    return written < 0 ? errno : (size_t)written < size ? EAGAIN : 0;
}

/* Return whether a file still has a name. */
int dicom_node_has_name(int file) {
    struct stat found;
    return !fstat(file, &found) && found.st_nlink;
}

/* Write a whole file out of memory that begins at a block's boundary: the part of a block at its end by the page cache,
   then the blocks before it past it. On return 0 all of it is on stable storage, the file is closed, and the answer is
   sent; UNSENT where only that has failed. Else an error number: EAGAIN where the disk took but a part, EINVAL where the
   file system knows no O_DIRECT; nothing is lost then that the usual way mends. */
int dicom_node_land(int file, const uint8_t *content, size_t size, int connection, const uint8_t *answer,
                    size_t length) {
    size_t blocks = size - size % DISK_BLOCK;
    int wrong = 0;
    if (size > blocks) {
        wrong = write_all(file, content + blocks, size - blocks, (off_t)blocks);
        sync_file_range(file, (off_t)blocks, (off_t)(size - blocks), SYNC_FILE_RANGE_WRITE); /* for fsync to find done */
    }
    if (!wrong && blocks)
        wrong = fcntl(file, F_SETFL, O_DIRECT) < 0 ? errno : write_all(file, content, blocks, 0);
    if (!wrong && fsync(file) < 0)
        wrong = errno;
    if (!wrong && !dicom_node_has_name(file))
        wrong = ESTALE; /* somebody has deleted it: nobody would find what is acknowledged */
    if (wrong) {
        fcntl(file, F_SETFL, 0); /* as it was: the usual way begins by the page cache */
        return wrong;
    }
    wrong = send_all(connection, answer, length);
    close(file);
    return wrong;
}
