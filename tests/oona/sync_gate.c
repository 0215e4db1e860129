/* Holds every sync while the file named by SYNC_GATE exists, and counts syncs that wait; fails them while the file
   named by SYNC_FAIL exists. Preloaded into a server under test. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static int gated(int fd, const char *name) {
    const char *gate = getenv("SYNC_GATE"), *fail = getenv("SYNC_FAIL"), *held = getenv("SYNC_HELD");
    if (gate && access(gate, F_OK) == 0) {
        int mark = open(held, O_CREAT | O_WRONLY, 0600);
        close(mark);
        struct timespec pause = {0, 1000000};
        while (access(gate, F_OK) == 0) nanosleep(&pause, NULL);
    }
    if (fail && access(fail, F_OK) == 0) {
        errno = EIO;
        return -1;
    }
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    return real(fd);
}

int fsync(int fd) { return gated(fd, "fsync"); }
int fdatasync(int fd) { return gated(fd, "fdatasync"); }
