/* The names of many files at once: one wait without the interpreter's lock for all of them, not one for each.

   Nothing is decided here either. Each function does what it is told in order, stops at the first that fails, and
   returns how many are done: Python goes on from there, and says what is wrong. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *next(const char *path) { return path + strlen(path) + 1; }

/* Give files a second name; `paths` are pairs of the name there is and the new one, each ended by a zero. */
size_t dicom_node_link(const char *paths, size_t number) {
    for (size_t done = 0; done < number; done++) {
        const char *name = next(paths);
        if (link(paths, name) < 0)
            return done;
        paths = next(name);
    }
    return number;
}

/* Take names away, each ended by a zero. */
size_t dicom_node_unlink(const char *paths, size_t number) {
    for (size_t done = 0; done < number; done++, paths = next(paths))
        if (unlink(paths) < 0)
            return done;
    return number;
}

/* Make files that are not there yet, each name ended by a zero, and leave them open in `descriptors`. */
size_t dicom_node_create(const char *paths, size_t number, unsigned mode, int *descriptors) {
    for (size_t done = 0; done < number; done++, paths = next(paths))
        if ((descriptors[done] = open(paths, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, mode)) < 0)
            return done;
    return number;
}
