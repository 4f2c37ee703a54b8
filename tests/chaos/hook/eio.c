// Fails one call on files below a directory with EIO: the n-th write, fsync, rename, link, unlink or mkdir. LD_PRELOAD it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char below[512];
static int calls, fails;

void eio_at(const char *directory, int call) {
    fails = call, calls = 0;
    strncpy(below, directory, sizeof below - 1);
}
int eio_calls(void) { return calls; }

static int hit(const char *path) {
    if (!below[0] || !path || !strstr(path, below) || __sync_add_and_fetch(&calls, 1) != fails) return 0;
    errno = EIO;
    return 1;
}
static int hit_file(int file) {
    char link[64], path[1024];
    if (!below[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return hit(path);
}
#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int file, const void *data, size_t size) {
    REAL(write);
    return hit_file(file) ? -1 : real(file, data, size);
}
int fsync(int file) { REAL(fsync); return hit_file(file) ? -1 : real(file); }
int rename(const char *from, const char *to) {
    REAL(rename);
    return hit(from) ? -1 : real(from, to);
}
int link(const char *from, const char *to) {
    REAL(link);
    return hit(from) ? -1 : real(from, to);
}
int unlink(const char *path) { REAL(unlink); return hit(path) ? -1 : real(path); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return hit(path) ? -1 : real(path, mode); }
