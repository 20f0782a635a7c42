/* Faults of the file system by LD_PRELOAD: counts the calls on files below one folder and makes them
 * fail from a chosen call on. Idle until forks.py calls soak_arm() in a run. Built by file_faults.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, ONE_CHANGE, ALL_CHANGES, SHORT_WRITES, ONE_READ, SIGNAL };

static char root[4096];
static size_t length;
static int kind, error, armed;
static long first, changes, reads;

void soak_arm(const char *folder, int fault, int number, long from) {
  snprintf(root, sizeof root, "%s/", folder);
  length = strlen(root);
  kind = fault, error = number, first = from, changes = reads = 0, armed = 1;
}
long soak_changes(void) { return changes; }
long soak_reads(void) { return reads; }

static int below(const char *path) { return !strncmp(path, root, length); }

static int below_at(int folder, const char *path) {
  char link[64], real[4096];
  if (!armed || !path) return 0;
  if (path[0] == '/' || folder == AT_FDCWD) return below(path);
  snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
  ssize_t size = readlink(link, real, sizeof real - 2);
  if (size < 0) return 0;
  real[size] = '/', real[size + 1] = 0;
  return below(real);
}

static int below_fd(int fd) {
  char link[64], real[4096];
  if (!armed) return 0;
  int saved = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, real, sizeof real - 1);
  errno = saved;
  if (size < 0) return 0;
  real[size] = 0;
  return below(real);
}

/* True if this change must fail. frees: it needs no space, so a full disk allows it. */
static int fails(int frees) {
  long n = __atomic_add_fetch(&changes, 1, __ATOMIC_SEQ_CST);
  if (kind == SIGNAL && n == first) kill(getpid(), error); /* error holds a signal number */
  int hit = kind == ONE_CHANGE ? n == first : kind == ALL_CHANGES && n >= first;
  if (!hit || (frees && error == ENOSPC)) return 0;
  errno = error;
  return 1;
}

/* True if this write must be short. */
static int is_short(size_t size) { return kind == SHORT_WRITES && changes >= first && size > 1; }

static int read_fails(void) {
  long n = __atomic_add_fetch(&reads, 1, __ATOMIC_SEQ_CST);
  if (kind != ONE_READ || n != first) return 0;
  errno = error;
  return 1;
}

#define REAL(type, name, ...)                                     \
  static type (*real)(__VA_ARGS__);                               \
  if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

#define OPEN(name)                                                              \
  int name(const char *path, int flags, ...) {                                  \
    REAL(int, name, const char *, int, ...);                                    \
    va_list more;                                                               \
    va_start(more, flags);                                                      \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;     \
    va_end(more);                                                               \
    if (below_at(AT_FDCWD, path) && WRITES(flags) && fails(!(flags & O_CREAT))) \
      return -1;                                                                \
    return real(path, flags, mode);                                             \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                          \
  int name(int folder, const char *path, int flags, ...) {                    \
    REAL(int, name, int, const char *, int, ...);                             \
    va_list more;                                                             \
    va_start(more, flags);                                                    \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;   \
    va_end(more);                                                             \
    if (below_at(folder, path) && WRITES(flags) && fails(!(flags & O_CREAT))) \
      return -1;                                                              \
    return real(folder, path, flags, mode);                                   \
  }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *from, size_t size) {
  REAL(ssize_t, write, int, const void *, size_t);
  if (below_fd(fd)) {
    if (fails(0)) return -1;
    if (is_short(size)) size /= 2;
  }
  return real(fd, from, size);
}

#define PWRITE(name)                                                \
  ssize_t name(int fd, const void *from, size_t size, off_t at) {   \
    REAL(ssize_t, name, int, const void *, size_t, off_t);          \
    if (below_fd(fd) && fails(0)) return -1;                        \
    return real(fd, from, size, at);                                \
  }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(ssize_t, writev, int, const struct iovec *, int);
  if (below_fd(fd) && fails(0)) return -1;
  return real(fd, parts, count);
}

ssize_t read(int fd, void *to, size_t size) {
  REAL(ssize_t, read, int, void *, size_t);
  if (below_fd(fd) && read_fails()) return -1;
  return real(fd, to, size);
}

#define ON_FD(name)                           \
  int name(int fd) {                          \
    REAL(int, name, int);                     \
    if (below_fd(fd) && fails(0)) return -1;  \
    return real(fd);                          \
  }
ON_FD(fsync)
ON_FD(fdatasync)

#define ON_PATH(name, frees)                                         \
  int name(const char *path) {                                       \
    REAL(int, name, const char *);                                   \
    if (below_at(AT_FDCWD, path) && fails(frees)) return -1;         \
    return real(path);                                               \
  }
ON_PATH(unlink, 1)
ON_PATH(rmdir, 1)

int unlinkat(int folder, const char *path, int flags) {
  REAL(int, unlinkat, int, const char *, int);
  if (below_at(folder, path) && fails(1)) return -1;
  return real(folder, path, flags);
}

int rename(const char *from, const char *to) {
  REAL(int, rename, const char *, const char *);
  if (below_at(AT_FDCWD, to) && fails(0)) return -1;
  return real(from, to);
}

int renameat(int from, const char *a, int to, const char *b) {
  REAL(int, renameat, int, const char *, int, const char *);
  if (below_at(to, b) && fails(0)) return -1;
  return real(from, a, to, b);
}

int mkdir(const char *path, mode_t mode) {
  REAL(int, mkdir, const char *, mode_t);
  if (below_at(AT_FDCWD, path) && fails(0)) return -1;
  return real(path, mode);
}

int mkdirat(int folder, const char *path, mode_t mode) {
  REAL(int, mkdirat, int, const char *, mode_t);
  if (below_at(folder, path) && fails(0)) return -1;
  return real(folder, path, mode);
}
