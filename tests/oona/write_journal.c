/* Journals what a process does to the files whose path begins with JOURNAL_OF, in the order in which it is done: each
   entry is a struct below, followed by the path (of an open) or the data (of a write). Preloaded into a server under
   test, so that its files can be put together again as they would be had the power failed at any moment. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum { OPEN = 1, WRITE = 2, TRUNCATE = 3, SYNC = 4, UNLINK = 5, CLOSE = 6 };
struct entry {
    uint32_t what, fd;
    uint64_t offset, length;
};

#define FDS 4096
static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER;
static char followed[FDS];
static int journal = -1;

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static void append(uint32_t what, int fd, uint64_t offset, const void *data, uint64_t length) {
    static ssize_t (*write_)(int, const void *, size_t);
    if (!write_) write_ = (ssize_t (*)(int, const void *, size_t))real("write");
    if (journal < 0) {
        int (*open_)(const char *, int, ...) = (int (*)(const char *, int, ...))real("open");
        journal = open_(getenv("JOURNAL"), O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0600);
        if (journal < 0) abort();
    }
    struct entry entry = {what, (uint32_t)fd, offset, length};
    uint64_t size = sizeof entry + (data ? length : 0), done = 0;
    char *bytes = malloc(size);
    memcpy(bytes, &entry, sizeof entry);
    if (data) memcpy(bytes + sizeof entry, data, length);
    while (done < size) {
        ssize_t written = write_(journal, bytes + done, size - done);
        if (written < 0) abort();
        done += (uint64_t)written;
    }
    free(bytes);
}

static int wanted(const char *path) {
    const char *prefix = getenv("JOURNAL_OF");
    return prefix && path && strncmp(path, prefix, strlen(prefix)) == 0;
}

static int is_followed(int fd) { return fd >= 0 && fd < FDS && followed[fd]; }

static int open_as(const char *name, const char *path, int flags, mode_t mode) {
    int (*open_)(const char *, int, ...) = (int (*)(const char *, int, ...))real(name);
    if (!wanted(path)) return open_(path, flags, mode);
    pthread_mutex_lock(&order);
    int fd = open_(path, flags, mode);
    if (fd >= FDS) abort();
    if (fd >= 0) {
        followed[fd] = 1;
        append(OPEN, fd, (uint64_t)flags, path, strlen(path));
    }
    pthread_mutex_unlock(&order);
    return fd;
}

#define MODE(flags)                                  \
    mode_t mode = 0;                                 \
    if ((flags) & (O_CREAT | O_TMPFILE)) {           \
        va_list rest;                                \
        va_start(rest, flags);                       \
        mode = (mode_t)va_arg(rest, int);            \
        va_end(rest);                                \
    }

int open(const char *path, int flags, ...) { MODE(flags) return open_as("open", path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return open_as("open64", path, flags, mode); }

static ssize_t write_at(const char *name, int fd, const void *data, size_t length, off_t offset) {
    ssize_t (*pwrite_)(int, const void *, size_t, off_t) = (ssize_t (*)(int, const void *, size_t, off_t))real(name);
    if (!is_followed(fd)) return pwrite_(fd, data, length, offset);
    pthread_mutex_lock(&order);
    ssize_t written = pwrite_(fd, data, length, offset);
    if (written > 0) append(WRITE, fd, (uint64_t)offset, data, (uint64_t)written);
    pthread_mutex_unlock(&order);
    return written;
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) {
    return write_at("pwrite", fd, data, length, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t length, off_t offset) {
    return write_at("pwrite64", fd, data, length, offset);
}

ssize_t write(int fd, const void *data, size_t length) {
    ssize_t (*write_)(int, const void *, size_t) = (ssize_t (*)(int, const void *, size_t))real("write");
    if (!is_followed(fd)) return write_(fd, data, length);
    pthread_mutex_lock(&order);
    off_t offset = lseek(fd, 0, SEEK_CUR);
    ssize_t written = write_(fd, data, length);
    if (written > 0) append(WRITE, fd, (uint64_t)offset, data, (uint64_t)written);
    pthread_mutex_unlock(&order);
    return written;
}

static int truncate_as(const char *name, int fd, off_t length) {
    int (*truncate_)(int, off_t) = (int (*)(int, off_t))real(name);
    if (!is_followed(fd)) return truncate_(fd, length);
    pthread_mutex_lock(&order);
    int result = truncate_(fd, length);
    if (result == 0) append(TRUNCATE, fd, 0, NULL, (uint64_t)length);
    pthread_mutex_unlock(&order);
    return result;
}

int ftruncate(int fd, off_t length) { return truncate_as("ftruncate", fd, length); }
int ftruncate64(int fd, off_t length) { return truncate_as("ftruncate64", fd, length); }

/* What is written while a sync runs may not be covered by it; nothing is, as the order is held. */
static int sync_as(const char *name, int fd) {
    int (*sync_)(int) = (int (*)(int))real(name);
    if (!is_followed(fd)) return sync_(fd);
    pthread_mutex_lock(&order);
    int result = sync_(fd);
    if (result == 0) append(SYNC, fd, 0, NULL, 0);
    pthread_mutex_unlock(&order);
    return result;
}

int fsync(int fd) { return sync_as("fsync", fd); }
int fdatasync(int fd) { return sync_as("fdatasync", fd); }

int unlink(const char *path) {
    int (*unlink_)(const char *) = (int (*)(const char *))real("unlink");
    if (!wanted(path)) return unlink_(path);
    pthread_mutex_lock(&order);
    int result = unlink_(path);
    if (result == 0) append(UNLINK, 0, 0, path, strlen(path));
    pthread_mutex_unlock(&order);
    return result;
}

int close(int fd) {
    int (*close_)(int) = (int (*)(int))real("close");
    if (!is_followed(fd)) return close_(fd);
    pthread_mutex_lock(&order);
    followed[fd] = 0;
    append(CLOSE, fd, 0, NULL, 0);
    int result = close_(fd);
    pthread_mutex_unlock(&order);
    return result;
}
