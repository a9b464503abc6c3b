/* Stands between a process and its disk and clock: counts, journals, fails or kills at durable operations below one
 * folder. Loaded by LD_PRELOAD; tests/faults/shim.py is the other side. What it does is read from a control file that
 * all processes share, so that it can be changed while they run. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { KILL_BEFORE = 1, KILL_AFTER = 2, FAIL = 3, POWER_CUT = 4 };

struct control {         /* the layout is known to shim.py */
    uint64_t count;      /* durable operations so far, of all processes */
    uint64_t matched;    /* those that fit the pattern since it was set */
    uint64_t at;         /* the first match that something is done to; 0: none */
    uint64_t span;       /* how many matches from there on */
    uint32_t act;        /* one of the above */
    uint32_t error;      /* errno of FAIL */
    uint32_t dead;       /* the power is cut: whoever comes by dies */
    uint32_t journal;    /* write a journal */
    int64_t clock;       /* seconds added to the time of day */
    char pattern[256];   /* of "role operation path", as fnmatch understands it */
    char acted[512];     /* what something was done to, the last time */
};

struct record { /* the head of a journal entry; path, other and data follow */
    uint64_t number;
    int64_t answer;
    uint64_t inode;
    int64_t offset;
    uint32_t path, other, data;
    char role[8];
    char operation[12];
};

static struct control *control;
static const char *root;
static size_t root_length;
static char role[8];
static int journal = -1;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static int real_open(const char *path, int flags, int mode) {
    static int (*next)(const char *, int, ...);
    if (!next) next = real("open64");
    return next(path, flags, mode);
}

static ssize_t real_write(int fd, const void *data, size_t size) {
    static ssize_t (*next)(int, const void *, size_t);
    if (!next) next = real("write");
    return next(fd, data, size);
}

__attribute__((constructor)) static void begin(void) {
    char line[4096];
    const char *folder = getenv("FAULT_ROOT"), *where = getenv("FAULT_CONTROL"), *into = getenv("FAULT_JOURNAL");
    if (!folder || !where || !into) return;
    int fd = real_open(where, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) return;
    void *shared = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (shared == MAP_FAILED) return;
    control = shared;
    fd = real_open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC, 0);
    ssize_t size = fd < 0 ? 0 : read(fd, line, sizeof line - 1);
    if (fd >= 0) close(fd);
    for (ssize_t n = 0; n < size; n++)
        if (!line[n]) line[n] = ' ';
    line[size > 0 ? size : 0] = 0;
    if (strstr(line, "-m workers ")) strcpy(role, strstr(line, "--queue deliver") ? "deliver" : "infer");
    else if (strstr(line, " serve ")) strcpy(role, "node");
    else return; /* the clock is for all, the disk for the node's own processes */
    journal = real_open(into, O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    root_length = strlen(folder);
    root = folder;
}

/* -- where ---------------------------------------------------------------------------------------------- */

static int is_below(const char *path) {
    return root && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int of_descriptor(int fd, char *path) { /* the path of an open file below the root */
    char link[64];
    if (!root || fd < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, PATH_MAX - 1);
    path[size > 0 ? size : 0] = 0;
    return size > 0 && is_below(path);
}

static int of_name(int folder, const char *name, char *path) {
    char base[PATH_MAX];
    if (!root || !name) return 0;
    if (name[0] == '/') snprintf(path, PATH_MAX, "%s", name);
    else if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
        if ((size_t)snprintf(path, PATH_MAX, "%s/%s", base, name) >= PATH_MAX) return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t size = readlink(link, base, sizeof base - 1);
        if (size <= 0) return 0;
        base[size] = 0;
        if ((size_t)snprintf(path, PATH_MAX, "%s/%s", base, name) >= PATH_MAX) return 0;
    }
    return is_below(path);
}

static const char *inside(const char *path) { return path[root_length] ? path + root_length + 1 : "."; }

/* -- what is done --------------------------------------------------------------------------------------- */

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static int acts; /* under the lock: this very operation is one that something is done to */

static int before(const char *operation, const char *path) { /* takes the lock; returns an errno, or 0 */
    char line[PATH_MAX + 64];
    pthread_mutex_lock(&mutex);
    flock(journal, LOCK_EX);
    if (control->dead) die();
    control->count++;
    acts = 0;
    if (!control->at) return 0;
    snprintf(line, sizeof line, "%s %s %s", role, operation, inside(path));
    if (fnmatch(control->pattern, line, 0)) return 0;
    control->matched++;
    if (control->matched < control->at || control->matched - control->at >= control->span) return 0;
    acts = 1;
    snprintf(control->acted, sizeof control->acted, "%.500s", line);
    if (control->act == KILL_BEFORE) die();
    return control->act == FAIL ? (int)control->error : 0;
}

static void put(const void *data, size_t size) {
    while (size > 0) {
        ssize_t done = real_write(journal, data, size);
        if (done <= 0) return;
        data = (const char *)data + done;
        size -= (size_t)done;
    }
}

static void after(const char *operation, const char *path, const char *other, int64_t answer, uint64_t inode,
                  int64_t offset, const void *data, size_t size) { /* gives the lock back; keeps errno */
    int error = errno;
    if (control->journal && answer >= 0) {
        struct record head = {.number = control->count, .answer = answer, .inode = inode, .offset = offset};
        head.path = (uint32_t)strlen(inside(path));
        head.other = other ? (uint32_t)strlen(inside(other)) : 0;
        head.data = (uint32_t)size;
        strcpy(head.role, role);
        strcpy(head.operation, operation);
        put(&head, sizeof head);
        put(inside(path), head.path);
        if (other) put(inside(other), head.other);
        put(data, size);
    }
    if (acts && control->act == POWER_CUT) control->dead = 1;
    if (acts && (control->act == KILL_AFTER || control->act == POWER_CUT)) die();
    flock(journal, LOCK_UN);
    pthread_mutex_unlock(&mutex);
    errno = error;
}

static int refuse(int error) {
    flock(journal, LOCK_UN);
    pthread_mutex_unlock(&mutex);
    errno = error;
    return -1;
}

static uint64_t inode_of(int fd) {
    struct stat found;
    return fstat(fd, &found) ? 0 : (uint64_t)found.st_ino;
}

/* -- files that come into being ------------------------------------------------------------------------- */

static int opened(int folder, const char *name, int flags, int mode) {
    static int (*next)(int, const char *, int, ...);
    char path[PATH_MAX];
    if (!next) next = real("openat64");
    int unnamed = (flags & O_TMPFILE) == O_TMPFILE;
    if (!(flags & (O_CREAT | O_TRUNC)) && !unnamed) return next(folder, name, flags, mode);
    if (!of_name(folder, name, path)) return next(folder, name, flags, mode);
    int is_there = !unnamed && !faccessat(folder, name, F_OK, 0);
    if (is_there && !(flags & O_TRUNC)) return next(folder, name, flags, mode);
    const char *operation = unnamed ? "tmpfile" : is_there ? "truncate" : "create";
    int error = before(operation, path);
    if (error) return refuse(error);
    int fd = next(folder, name, flags, mode);
    int failure = errno;
    uint64_t inode = fd < 0 ? 0 : inode_of(fd);
    errno = failure;
    after(operation, path, NULL, fd, inode, 0, NULL, 0);
    return fd;
}

#define MODE(flags)                                       \
    int mode = 0;                                         \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {              \
        va_list more;                                     \
        va_start(more, flags);                            \
        mode = va_arg(more, int);                         \
        va_end(more);                                     \
    }

int open(const char *name, int flags, ...) { MODE(flags) return opened(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE(flags) return opened(AT_FDCWD, name, flags, mode); }
int openat(int folder, const char *name, int flags, ...) { MODE(flags) return opened(folder, name, flags, mode); }
int openat64(int folder, const char *name, int flags, ...) { MODE(flags) return opened(folder, name, flags, mode); }
int creat(const char *name, mode_t mode) { return opened(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, (int)mode); }

/* -- bytes ---------------------------------------------------------------------------------------------- */

ssize_t write(int fd, const void *data, size_t size) {
    char path[PATH_MAX];
    if (!of_descriptor(fd, path)) return real_write(fd, data, size);
    int error = before("write", path);
    if (error) return refuse(error);
    ssize_t done = real_write(fd, data, size);
    int failure = errno;
    off_t end = lseek(fd, 0, SEEK_CUR);
    errno = failure;
    after("write", path, NULL, done, inode_of(fd), (int64_t)end - done, data, done > 0 ? (size_t)done : 0);
    return done;
}

static ssize_t written_at(int fd, const void *data, size_t size, off_t offset) {
    static ssize_t (*next)(int, const void *, size_t, off_t);
    char path[PATH_MAX];
    if (!next) next = real("pwrite64");
    if (!of_descriptor(fd, path)) return next(fd, data, size, offset);
    int error = before("write", path);
    if (error) return refuse(error);
    ssize_t done = next(fd, data, size, offset);
    after("write", path, NULL, done, inode_of(fd), offset, data, done > 0 ? (size_t)done : 0);
    return done;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return written_at(fd, data, size, offset); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return written_at(fd, data, size, offset); }

static ssize_t copied(int fd, const char *path, ssize_t done, off_t end) { /* journal what has been written already */
    int failure = errno;
    char *data = done > 0 ? malloc((size_t)done) : NULL;
    int readable = done > 0 ? real_open(path, O_RDONLY | O_CLOEXEC, 0) : -1;
    ssize_t found = readable < 0 ? -1 : pread(readable, data, (size_t)done, end - done);
    if (readable >= 0) close(readable);
    errno = failure;
    after("write", path, NULL, done, inode_of(fd), (int64_t)(end - done), data, found > 0 ? (size_t)found : 0);
    free(data);
    return done;
}

static ssize_t gathered(int fd, const struct iovec *parts, int count, off_t offset, const char *name) {
    char path[PATH_MAX];
    int at = offset >= 0;
    ssize_t (*next)(int, const struct iovec *, int) = at ? NULL : real(name);
    ssize_t (*next_at)(int, const struct iovec *, int, off_t) = at ? real(name) : NULL;
    if (!of_descriptor(fd, path)) return at ? next_at(fd, parts, count, offset) : next(fd, parts, count);
    int error = before("write", path);
    if (error) return refuse(error);
    ssize_t done = at ? next_at(fd, parts, count, offset) : next(fd, parts, count);
    int failure = errno;
    off_t start = at ? offset : lseek(fd, 0, SEEK_CUR) - (done > 0 ? done : 0);
    char *data = done > 0 ? malloc((size_t)done) : NULL;
    size_t filled = 0;
    for (int n = 0; n < count && done > 0 && filled < (size_t)done; n++) {
        size_t share = parts[n].iov_len < (size_t)done - filled ? parts[n].iov_len : (size_t)done - filled;
        memcpy(data + filled, parts[n].iov_base, share);
        filled += share;
    }
    errno = failure;
    after("write", path, NULL, done, inode_of(fd), start, data, filled);
    free(data);
    return done;
}

ssize_t writev(int fd, const struct iovec *parts, int count) { return gathered(fd, parts, count, -1, "writev"); }
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    return gathered(fd, parts, count, offset, "pwritev64");
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) {
    return gathered(fd, parts, count, offset, "pwritev64");
}

ssize_t sendfile64(int fd, int from, off64_t *offset, size_t size) {
    char path[PATH_MAX];
    ssize_t (*next)(int, int, off64_t *, size_t) = real("sendfile64");
    if (!of_descriptor(fd, path)) return next(fd, from, offset, size);
    int error = before("write", path);
    if (error) return refuse(error);
    ssize_t done = next(fd, from, offset, size);
    return copied(fd, path, done, lseek(fd, 0, SEEK_CUR));
}

ssize_t splice(int from, off64_t *from_offset, int fd, off64_t *offset, size_t size, unsigned flags) {
    char path[PATH_MAX];
    ssize_t (*next)(int, off64_t *, int, off64_t *, size_t, unsigned) = real("splice");
    if (!of_descriptor(fd, path)) return next(from, from_offset, fd, offset, size, flags);
    int error = before("write", path);
    if (error) return refuse(error);
    ssize_t done = next(from, from_offset, fd, offset, size, flags);
    return copied(fd, path, done, offset ? *offset : lseek(fd, 0, SEEK_CUR));
}

ssize_t copy_file_range(int from, off64_t *from_offset, int fd, off64_t *offset, size_t size, unsigned flags) {
    char path[PATH_MAX];
    ssize_t (*next)(int, off64_t *, int, off64_t *, size_t, unsigned) = real("copy_file_range");
    if (!of_descriptor(fd, path)) return next(from, from_offset, fd, offset, size, flags);
    int error = before("write", path);
    if (error) return refuse(error);
    ssize_t done = next(from, from_offset, fd, offset, size, flags);
    return copied(fd, path, done, offset ? *offset : lseek(fd, 0, SEEK_CUR));
}

static int shortened(int fd, off_t size) {
    static int (*next)(int, off_t);
    char path[PATH_MAX];
    if (!next) next = real("ftruncate64");
    if (!of_descriptor(fd, path)) return next(fd, size);
    int error = before("truncate", path);
    if (error) return refuse(error);
    int answer = next(fd, size);
    after("truncate", path, NULL, answer, inode_of(fd), size, NULL, 0);
    return answer;
}

int ftruncate(int fd, off_t size) { return shortened(fd, size); }
int ftruncate64(int fd, off64_t size) { return shortened(fd, size); }

static int reserved(int fd, off_t offset, off_t size, const char *name) { /* answers an errno, sets none */
    char path[PATH_MAX];
    int (*next)(int, off_t, off_t) = real(name);
    if (!of_descriptor(fd, path)) return next(fd, offset, size);
    int error = before("allocate", path);
    if (error) return refuse(error), error;
    int answer = next(fd, offset, size);
    after("allocate", path, NULL, answer ? -1 : 0, inode_of(fd), offset + size, NULL, 0);
    return answer;
}

int posix_fallocate(int fd, off_t offset, off_t size) { return reserved(fd, offset, size, "posix_fallocate64"); }
int posix_fallocate64(int fd, off64_t offset, off64_t size) { return reserved(fd, offset, size, "posix_fallocate64"); }

/* -- what makes it last --------------------------------------------------------------------------------- */

static int synced(int fd, const char *name) {
    char path[PATH_MAX];
    struct stat found;
    int (*next)(int) = real(name);
    if (!of_descriptor(fd, path)) return next(fd);
    const char *operation = !fstat(fd, &found) && S_ISDIR(found.st_mode) ? "fsyncdir" : "fsync";
    int error = before(operation, path);
    if (error) return refuse(error);
    int answer = next(fd);
    after(operation, path, NULL, answer, (uint64_t)found.st_ino, 0, NULL, 0);
    return answer;
}

int fsync(int fd) { return synced(fd, "fsync"); }
int fdatasync(int fd) { return synced(fd, "fdatasync"); }

/* -- names ---------------------------------------------------------------------------------------------- */

static uint64_t inode_at(const char *path) {
    struct stat found;
    return lstat(path, &found) ? 0 : (uint64_t)found.st_ino;
}

#define NAMED(operation, folder, name, call)                     \
    char path[PATH_MAX];                                         \
    if (!of_name(folder, name, path)) return call;               \
    int error = before(operation, path);                         \
    if (error) return refuse(error);                             \
    uint64_t inode = inode_at(path);                             \
    int answer = call;                                           \
    after(operation, path, NULL, answer, inode, 0, NULL, 0);     \
    return answer;

#define RENAMED(operation, folder, name, other_folder, other_name, call)       \
    char path[PATH_MAX], other[PATH_MAX];                                      \
    if (!of_name(other_folder, other_name, other)) return call;                \
    if (!of_name(folder, name, path)) snprintf(path, sizeof path, "%s", root); \
    int error = before(operation, other);                                      \
    if (error) return refuse(error);                                           \
    int answer = call;                                                         \
    after(operation, path, other, answer, inode_at(other), 0, NULL, 0);        \
    return answer;

int rename(const char *name, const char *to) {
    RENAMED("rename", AT_FDCWD, name, AT_FDCWD, to, REAL(rename)(name, to))
}
int renameat(int folder, const char *name, int other_folder, const char *to) {
    RENAMED("rename", folder, name, other_folder, to, REAL(renameat)(folder, name, other_folder, to))
}
int renameat2(int folder, const char *name, int other_folder, const char *to, unsigned flags) {
    RENAMED("rename", folder, name, other_folder, to, REAL(renameat2)(folder, name, other_folder, to, flags))
}
int link(const char *name, const char *to) { RENAMED("link", AT_FDCWD, name, AT_FDCWD, to, REAL(link)(name, to)) }
int linkat(int folder, const char *name, int other_folder, const char *to, int flags) {
    RENAMED("link", folder, name, other_folder, to, REAL(linkat)(folder, name, other_folder, to, flags))
}
int unlink(const char *name) { NAMED("unlink", AT_FDCWD, name, REAL(unlink)(name)) }
int unlinkat(int folder, const char *name, int flags) {
    NAMED("unlink", folder, name, REAL(unlinkat)(folder, name, flags))
}
int rmdir(const char *name) { NAMED("unlink", AT_FDCWD, name, REAL(rmdir)(name)) }
int mkdir(const char *name, mode_t mode) { NAMED("mkdir", AT_FDCWD, name, REAL(mkdir)(name, mode)) }
int mkdirat(int folder, const char *name, mode_t mode) {
    NAMED("mkdir", folder, name, REAL(mkdirat)(folder, name, mode))
}

/* -- the time of day ------------------------------------------------------------------------------------ */

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*next)(clockid_t, struct timespec *);
    if (!next) next = real("clock_gettime");
    int answer = next(clock, now);
    if (!answer && control && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += control->clock;
    return answer;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    static int (*next)(struct timeval *restrict, void *restrict);
    if (!next) next = real("gettimeofday");
    int answer = next(now, zone);
    if (!answer && control) now->tv_sec += control->clock;
    return answer;
}

time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}
