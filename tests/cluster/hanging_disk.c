/* A disk that hangs: preloaded into a server, it lets no call to the server's files return while a file says so.
 *
 * HANGING_DISK_SWITCH names a directory: while it holds the file "flush", flushes of WAL hang; while it holds "all", everything that goes to a file below
 * HANGING_DISK_DATA or to the file HANGING_DISK_LOG does.  Signals do not end the wait, as they do not in the kernel. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static bool
is_on(const char *what)
{
	const char *directory = getenv("HANGING_DISK_SWITCH");
	char		path[PATH_MAX];

	if (directory == NULL)
		return false;
	snprintf(path, sizeof(path), "%s/%s", directory, what);
	return access(path, F_OK) == 0;
}

static bool
is_below(const char *path, const char *directory)
{
	return directory != NULL && strncmp(path, directory, strlen(directory)) == 0;
}

static bool
is_on_disk(const char *path)
{
	const char *log = getenv("HANGING_DISK_LOG");

	/* The server's current directory is its data directory. */
	return path[0] != '/' || is_below(path, getenv("HANGING_DISK_DATA")) || (log != NULL && strcmp(path, log) == 0);
}

/* The path of an open file; empty if it has none. */
static void
path_of(int fd, char path[PATH_MAX])
{
	char		link[64];
	ssize_t		length;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	length = readlink(link, path, PATH_MAX - 1);
	path[length < 0 ? 0 : length] = '\0';
}

static void
wait_a_little(void)
{
	struct timespec pause = {0, 10 * 1000 * 1000};

	nanosleep(&pause, NULL);
}

static void
hang_with(int fd)
{
	char		path[PATH_MAX];

	while (is_on("all"))
	{
		path_of(fd, path);
		if (path[0] != '/' || !is_on_disk(path))
			return;
		wait_a_little();
	}
}

static void
hang_with_path(const char *path)
{
	while (is_on_disk(path) && is_on("all"))
		wait_a_little();
}

static void
hang_with_flush(int fd)
{
	char		path[PATH_MAX];

	hang_with(fd);
	while (is_on("flush"))
	{
		path_of(fd, path);
		if (strstr(path, "/pg_wal/") == NULL)
			return;
		wait_a_little();
	}
}

#define NEXT(name) ((__typeof__(&name)) dlsym(RTLD_NEXT, #name))

#define WAITS_WITH(name, result, hang, parameters, arguments) \
	result name parameters \
	{ \
		static __typeof__(&name) next; \
		if (next == NULL) \
			next = NEXT(name); \
		hang(fd); \
		return next arguments; \
	}

WAITS_WITH(fsync, int, hang_with_flush, (int fd), (fd))
WAITS_WITH(fdatasync, int, hang_with_flush, (int fd), (fd))
WAITS_WITH(sync_file_range, int, hang_with, (int fd, off64_t from, off64_t length, unsigned int flags), (fd, from, length, flags))
WAITS_WITH(ftruncate, int, hang_with, (int fd, off_t length), (fd, length))
WAITS_WITH(write, ssize_t, hang_with, (int fd, const void *bytes, size_t count), (fd, bytes, count))
WAITS_WITH(writev, ssize_t, hang_with, (int fd, const struct iovec *parts, int count), (fd, parts, count))
WAITS_WITH(pwrite, ssize_t, hang_with, (int fd, const void *bytes, size_t count, off_t at), (fd, bytes, count, at))
WAITS_WITH(pwrite64, ssize_t, hang_with, (int fd, const void *bytes, size_t count, off64_t at), (fd, bytes, count, at))
WAITS_WITH(pwritev, ssize_t, hang_with, (int fd, const struct iovec *parts, int count, off_t at), (fd, parts, count, at))
WAITS_WITH(pwritev64, ssize_t, hang_with, (int fd, const struct iovec *parts, int count, off64_t at), (fd, parts, count, at))
WAITS_WITH(read, ssize_t, hang_with, (int fd, void *bytes, size_t count), (fd, bytes, count))
WAITS_WITH(pread, ssize_t, hang_with, (int fd, void *bytes, size_t count, off_t at), (fd, bytes, count, at))
WAITS_WITH(pread64, ssize_t, hang_with, (int fd, void *bytes, size_t count, off64_t at), (fd, bytes, count, at))

#define OPENS(name) \
	int name(const char *path, int flags, ...) \
	{ \
		va_list		more; \
		mode_t		mode; \
		va_start(more, flags); \
		mode = flags & O_CREAT ? va_arg(more, mode_t) : 0; \
		va_end(more); \
		hang_with_path(path); \
		return NEXT(name) (path, flags, mode); \
	}

OPENS(open)
OPENS(open64)
