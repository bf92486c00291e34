"""What this host has of what the project needs: each check tries the real thing and says what to do where it fails."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hva_host.agent.model import Record
from hva_host.memory import syscalls
from hva_host.privileges import privileges
from hva_host.shim import ensure_shim
from hvaqemu import paths
from hvaqemu.errors import HvaError
from hvaqemu.qemu.logs import one_line, printable
from hvaqemu.qemu.profile import PROFILES, MachineProfile
from hvaqemu.units import GiB, MiB, format_size

UFFDIO_API = 0xC018AA3F
UFFD_API = 0xAA
#: Bits of include/uapi/linux/userfaultfd.h and the kernel each came with.
FEATURES = {
    "pagefault-flag-wp": 1 << 0,
    "missing-shmem": 1 << 5,
    "wp-hugetlbfs-shmem": 1 << 12,
}
PYTHON_MIN = (3, 11)
QEMU_MIN = (7, 2)
#: Where Debian keeps programs that an ordinary user's PATH leaves out.
_MORE_PATH = "/usr/sbin:/sbin"
_TOOL_SECONDS = 20.0
_TOOLS = {
    "qemu-img": ("qemu-utils", "makes a VM's disk"),
    "mmdebstrap": ("mmdebstrap", "builds guest images"),
    "mke2fs": ("e2fsprogs", "builds guest images"),
    "debugfs": ("e2fsprogs", "builds guest images"),
}
#: Huge pages behind shared memory. Punching a part of one zeroes it in place, and no fault ever comes.
_THP = Path("/sys/kernel/mm/transparent_hugepage")
_HUGE = {"always", "within_size", "force"}


class Check(Record):
    """One thing that was looked at."""

    name: str
    ok: bool
    #: What is there.
    found: str
    #: What to do; "" where it is ok.
    advice: str = ""
    #: Nothing works without it; else it is only good to know.
    needed: bool = True


def examine() -> list[Check]:
    """All checks, in the order to mend what fails. Takes up to a few seconds; changes nothing but our own cache."""
    checks = [_python(), _memfd(), _pidfd_getfd(), *_userfaultfd(), *_privileges(), _huge_pages(_THP)]
    for profile in PROFILES.values():
        checks += [_qemu(profile), _user_network(profile), _kvm(profile)]
    checks += [_tool(name, package, use) for name, (package, use) in _TOOLS.items()]
    checks += [
        _shim(),
        _room("runtime directory", paths.runtime_dir, 16 * MiB, "HVAQEMU_RUNTIME_DIR"),
        _room("cache directory", paths.cache_dir, 3 * GiB, "HVAQEMU_CACHE_DIR"),
        _room("state directory", paths.state_dir, 1 * GiB, "HVAQEMU_STATE_DIR"),
    ]
    return checks


def _python() -> Check:
    ok = sys.version_info >= PYTHON_MIN
    advice = "" if ok else f"install Python {'.'.join(map(str, PYTHON_MIN))} or newer"
    return Check(name="Python", ok=ok, found=platform.python_version(), advice=advice)


def _memfd() -> Check:
    try:
        os.close(os.memfd_create("hva-doctor", os.MFD_CLOEXEC))
    except OSError as error:
        return Check(name="memfd", ok=False, found=_words(error), advice="use a kernel with CONFIG_MEMFD_CREATE")
    return Check(name="memfd", ok=True, found="works")


def _pidfd_getfd() -> Check:
    """Of ourselves: shows that the kernel has it and no filter forbids it."""
    name = "pidfd_getfd"
    try:
        pidfd = os.pidfd_open(os.getpid())
        try:
            os.close(syscalls.pidfd_getfd(pidfd, pidfd))
        finally:
            os.close(pidfd)
    except OSError as error:
        advice = "use kernel 5.6 or newer; in a container, give it CAP_SYS_PTRACE"
        return Check(name=name, ok=False, found=_words(error), advice=advice)
    return Check(name=name, ok=True, found="works")


def _userfaultfd() -> list[Check]:
    release = platform.release()
    try:
        descriptor = syscalls.userfaultfd()
    except OSError as error:
        advice = f"as root: setfacl -m u:{os.geteuid()}:rw /dev/userfaultfd (until the next boot; a udev rule stays)"
        if not Path("/dev/userfaultfd").exists():
            advice = "be root, or use kernel 6.1 or newer, which has /dev/userfaultfd to give you access to"
        if error.errno == errno.ENOSYS:
            advice = "use a kernel with CONFIG_USERFAULTFD"
        return [Check(name="userfaultfd", ok=False, found=_words(error), advice=advice)]
    try:
        checks = [Check(name="userfaultfd", ok=True, found=f"allowed: {_why_allowed()}")]
        offered = struct.pack("=QQQ", UFFD_API, 0, 0)
        try:
            # Asked for no feature, the kernel answers with all it has.
            _, features, _ = struct.unpack("=QQQ", fcntl.ioctl(descriptor, UFFDIO_API, offered))
        except OSError as error:
            features = 0
            release += f", {_words(error)}"
    finally:
        os.close(descriptor)
    checks.append(_features(features, release))
    return checks


def _privileges() -> list[Check]:
    return [
        Check(name=each.name, ok=each.held, found=each.found, advice=each.advice, needed=each.needed)
        for each in privileges(paths.cache_dir)
    ]


def _features(offered: int, release: str) -> Check:
    missing = [name for name, bit in FEATURES.items() if not offered & bit]
    return Check(
        name="kernel features",
        ok=not missing,
        found=f"Linux {release}: " + (f"no {', '.join(missing)}" if missing else ", ".join(FEATURES)),
        advice="use kernel 5.19 or newer with CONFIG_PTE_MARKER_UFFD_WP" if missing else "",
    )


def _why_allowed() -> str:
    if os.geteuid() == 0:
        return "root"
    if os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        return "/dev/userfaultfd"
    if _read(Path("/proc/sys/vm/unprivileged_userfaultfd")) == "1":
        return "vm.unprivileged_userfaultfd=1"
    return "CAP_SYS_PTRACE"


def _huge_pages(folder: Path) -> Check:
    """``folder``: /sys/kernel/mm/transparent_hugepage. Sizes of their own came with kernel 6.11."""
    huge = {}
    for path in [folder / "shmem_enabled", *sorted(folder.glob("hugepages-*/shmem_enabled"))]:
        # The chosen word stands in brackets.
        chosen = _read(path).partition("[")[2].partition("]")[0]
        if chosen in _HUGE:
            huge[path] = chosen
    if not huge:
        return Check(name="huge pages of shared memory", ok=True, found="off")
    return Check(
        name="huge pages of shared memory",
        ok=False,
        found=", ".join(f"{path.relative_to(folder)} is {chosen}" for path, chosen in huge.items()),
        advice="as root: " + "; ".join(f"echo never > {path}" for path in huge),
    )


def _qemu(profile: MachineProfile) -> Check:
    advice = "install the package qemu-system-misc"
    said = _output(profile.binary, "--version")
    if said is None:
        return Check(name=profile.binary, ok=False, found="not found", advice=advice)
    # "QEMU emulator version 7.2.22 (Debian ...)"
    words = said.partition("version ")[2].split()
    version = words[0] if words else ""
    try:
        known = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        known = ()
    accelerators = [line.strip() for line in (_output(profile.binary, "-accel", "help") or "").splitlines()[1:]]
    found = f"{version or one_line(said, 1)}, accelerators: {', '.join(accelerators) or 'unknown'}"
    ok = known >= QEMU_MIN and "tcg" in accelerators
    least = ".".join(map(str, QEMU_MIN))
    return Check(
        name=profile.binary, ok=ok, found=found, advice="" if ok else f"install QEMU {least} or newer with TCG"
    )


def _user_network(profile: MachineProfile) -> Check:
    """Some builds of QEMU are without it."""
    name = f"user networks of {profile.binary}"
    if "user" in (_output(profile.binary, "-netdev", "help") or "").split():
        return Check(name=name, ok=True, found="works")
    advice = "write network: none (or tap), or install a QEMU with libslirp"
    return Check(name=name, ok=False, found="not in this QEMU", advice=advice, needed=False)


def _kvm(profile: MachineProfile) -> Check:
    """Whether ``accelerator: kvm`` has a chance. Without it guests run under TCG."""
    name = f"KVM for {profile.name}"
    if platform.machine() != profile.name:
        return Check(name=name, ok=True, found=f"this host is {platform.machine()}; guests use tcg", needed=False)
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        advice = "may read and write /dev/kvm, or use accelerator: tcg"
        return Check(name=name, ok=False, found="/dev/kvm is not accessible", advice=advice, needed=False)
    return Check(name=name, ok=True, found="/dev/kvm is accessible", needed=False)


def _tool(name: str, package: str, use: str) -> Check:
    path = shutil.which(name) or shutil.which(name, path=_MORE_PATH)
    if path is None:
        return Check(name=name, ok=False, found=f"not found; {use}", advice=f"install the package {package}")
    return Check(name=name, ok=True, found=path)


def _shim() -> Check:
    """Also shows that there is a compiler."""
    try:
        path = ensure_shim()
    except HvaError as error:
        return Check(name="shim", ok=False, found=error.message, advice=error.hint)
    return Check(name="shim", ok=True, found=str(path))


def _room(name: str, place: Callable[[], Path], least: int, variable: str) -> Check:
    try:
        path = place()
        free = shutil.disk_usage(path).free
    except HvaError as error:
        return Check(name=name, ok=False, found=error.message, advice=error.hint or f"set {variable}")
    except OSError as error:
        return Check(name=name, ok=False, found=_words(error), advice=f"set {variable} to another place")
    ok = free >= least
    advice = "" if ok else f"make room ({format_size(least)} are needed), or set {variable} to another place"
    return Check(name=name, ok=ok, found=f"{path}: {format_size(free)} free", advice=advice)


def _output(*command: str) -> str | None:
    """What a program prints, or None where it is not there or does not work."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TOOL_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return printable(done.stdout)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _words(error: OSError) -> str:
    return error.strerror or str(error)
