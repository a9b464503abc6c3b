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

int dicom_node_version(void) { return 7; } /* changes with any argument or field: Python asks before it calls */

int64_t dicom_node_now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000LL + at.tv_nsec;
}

uint32_t dicom_node_big_endian(const uint8_t *at) {
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static ssize_t read_all(int connection, void *into, size_t size) {
    ssize_t got;
    do got = recv(connection, into, size, MSG_WAITALL); while (got < 0 && errno == EINTR);
    return got;
}

static int send_all(int connection, const uint8_t *answer, size_t length) {
    for (ssize_t sent; length; answer += sent, length -= (size_t)sent) {
        do sent = send(connection, answer, length, MSG_NOSIGNAL); while (sent < 0 && errno == EINTR);
        if (sent < 0)
            return UNSENT;
    }
    return 0;
}

/* Answer the message before, unless that has been done, and read the beginning of the next, if it comes within so many
   milliseconds: the head of a PDU and, where that is a P-DATA-TF with a fragment of a command set that fits, that
   fragment. Return how many bytes there are; 0 where none came in time, -1 where there will be none. */
ssize_t dicom_node_exchange(int connection, const uint8_t *answer, size_t length, int milliseconds, uint8_t *into,
                            size_t size) {
    if (send_all(connection, answer, length))
        return -1;
    struct pollfd waiting = {.fd = connection, .events = POLLIN};
    int ready;
    do ready = poll(&waiting, 1, milliseconds); while (ready < 0 && errno == EINTR);
    if (ready <= 0)
        return ready;
    ssize_t got = read_all(connection, into, PDU_HEAD);
    if (got < PDU_HEAD)
        return got > 0 ? got : -1;
    uint32_t in_pdu = dicom_node_big_endian(into + 2);
    if (into[0] != P_DATA_TF || in_pdu < PDV_HEAD)
        return got;
    ssize_t more = read_all(connection, into + PDU_HEAD, PDV_HEAD);
    if (more < PDV_HEAD)
        return got + (more > 0 ? more : 0);
    got += more;
    uint32_t value = dicom_node_big_endian(into + PDU_HEAD);
    if (value < 2 || value > in_pdu - 4 || value - 2 > size - (size_t)got || !(into[got - 1] & COMMAND))
        return got;
    more = value > 2 ? read_all(connection, into + got, value - 2) : 0;
    return got + (more > 0 ? more : 0);
}

/* Return the length of the next head: that of its PDU comes first where the present one ends. */
static uint8_t next_head(const struct flow *flow) { return flow->in_pdu ? PDV_HEAD : PDU_HEAD + PDV_HEAD; }

/* Fill `room` and then the head. Return 0, GONE or LATE. */
static int fill(struct flow *flow, uint8_t *room, size_t size, uint8_t head) {
    struct iovec pieces[2] = {{room, size}, {flow->head + flow->has, head}};
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = 2};
    while (pieces[0].iov_len + pieces[1].iov_len) {
        ssize_t got = recvmsg(flow->connection, &message, MSG_WAITALL);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK) ? LATE : GONE;
        for (int piece = 0; piece < 2; piece++) {
            size_t taken = (size_t)got < pieces[piece].iov_len ? (size_t)got : pieces[piece].iov_len;
            pieces[piece].iov_base = (uint8_t *)pieces[piece].iov_base + taken;
            pieces[piece].iov_len -= taken;
            got -= (ssize_t)taken;
        }
        if (pieces[0].iov_len + pieces[1].iov_len && dicom_node_now() > flow->deadline)
            return LATE;
    }
    flow->has += head;
    return 0;
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
   the room is, PROGRESS where this has taken a second, or GONE, LATE, VIOLATION. */
int dicom_node_fragments(struct flow *flow, uint8_t *room, size_t size, size_t *filled) {
    int64_t until = dicom_node_now() + 1000000000LL;
    for (;;) {
        int wrong = 0;
        if (!flow->left) {
            if (flow->is_last)
                return WHOLE;
            if (flow->has < PDV_HEAD)
                wrong = fill(flow, room, 0, next_head(flow));
            if (!wrong)
                wrong = begin_fragment(flow);
            if (!wrong && dicom_node_now() > until && flow->left)
                return PROGRESS;
        } else {
            size_t take = flow->left < size - *filled ? flow->left : size - *filled;
            if (!take)
                return FULL;
            flow->left -= (uint32_t)take;
            wrong = fill(flow, room + *filled, take, flow->left || flow->is_last ? 0 : next_head(flow));
            *filled += wrong ? 0 : take;
        }
        if (wrong)
            return wrong;
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
