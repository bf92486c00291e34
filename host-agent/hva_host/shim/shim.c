/*
 * Preloaded into QEMU. Opens, and leaves open in QEMU's descriptor table, what must live exactly as long as QEMU: a
 * userfaultfd, a memfd for the ledger and a memfd for the compressed store. A pager takes them with pidfd_getfd(2).
 * HVA_SHIM_STORE is the number of an inherited descriptor if the store is a file; a memfd then says which file it is.
 *
 * Acts only in the process it was meant for (HVA_SHIM=1) and takes itself out of the environment, so that nothing
 * QEMU starts is touched. Whatever fails ends the process: QEMU without these must not run.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef USERFAULTFD_IOC_NEW /* kernel headers before 6.1 */
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

static _Noreturn void fail(const char *what)
{
	dprintf(STDERR_FILENO, "hvaqemu shim: %s: %s\n", what, strerror(errno));
	_exit(1);
}

static _Noreturn void fail_userfaultfd(void)
{
	const char *hint = "";

	if (errno == EPERM || errno == EACCES)
		hint = " (be root, or have /dev/userfaultfd made readable and writable for you; see 'hvaqemu doctor')";
	dprintf(STDERR_FILENO, "hvaqemu shim: userfaultfd: %s%s\n", strerror(errno), hint);
	_exit(1);
}

static int open_userfaultfd(void)
{
	/* Not UFFD_USER_MODE_ONLY: QEMU's own system calls on guest RAM must fault to the pager too. */
	const int flags = O_CLOEXEC | O_NONBLOCK;
	int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);

	if (device >= 0) {
		int fd = ioctl(device, USERFAULTFD_IOC_NEW, flags);

		/* The pager matches links of /proc/PID/fd: the device must not stay among them. */
		close(device);
		if (fd >= 0)
			return fd;
	}
	return (int)syscall(SYS_userfaultfd, flags);
}

static void open_store(void)
{
	const char *file = getenv("HVA_SHIM_STORE");
	struct stat status;
	uint64_t identity[2];
	int fd, at;

	if (file == NULL) {
		if (memfd_create("hva-store", MFD_CLOEXEC) < 0)
			fail("memfd hva-store");
		return;
	}
	fd = atoi(file);
	if (fcntl(fd, F_SETFD, FD_CLOEXEC) < 0 || fstat(fd, &status) < 0)
		fail("store");
	identity[0] = status.st_dev;
	identity[1] = status.st_ino;
	at = memfd_create("hva-store-at", MFD_CLOEXEC);
	if (at < 0 || write(at, identity, sizeof(identity)) != sizeof(identity))
		fail("memfd hva-store-at");
	if (unsetenv("HVA_SHIM_STORE") != 0)
		fail("environment");
}

__attribute__((constructor)) static void hva_shim(void)
{
	const char *wanted = getenv("HVA_SHIM");

	if (wanted == NULL || strcmp(wanted, "1") != 0)
		return;
	if (unsetenv("HVA_SHIM") != 0 || unsetenv("LD_PRELOAD") != 0)
		fail("environment");
	if (open_userfaultfd() < 0)
		fail_userfaultfd();
	/* Sealed by its first pager: QEMU, should it be compromised, can not cut it and end pagers by SIGBUS. */
	if (memfd_create("hva-ledger", MFD_CLOEXEC | MFD_ALLOW_SEALING) < 0)
		fail("memfd hva-ledger");
	open_store();
	/* Punching a part of a huge page zeroes it in place, and no fault ever comes. */
	if (prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0)
		fail("PR_SET_THP_DISABLE");
	/* pidfd_getfd needs ptrace access; EINVAL: there is no yama to restrict it. */
	if (prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0) != 0 && errno != EINVAL)
		fail("PR_SET_PTRACER");
}
