"""Makes a tree of unpacked Debian packages into a system that runs.

No script of a package is run. What the scripts of the base image's own packages would do is written down here, one
function a subject; :func:`configured` tells of which packages all that matters is done.
"""

from __future__ import annotations

import re
import sys
from importlib import resources
from pathlib import Path

from hva_images.commands import run
from hva_images.modules import read_modules, write_indexes
from hva_images.tree import Tree
from hvaqemu.errors import HostError

#: Packages whose maintainer scripts do nothing on a first installation but what the functions below do.
_CONFIGURED = frozenset(
    [
        "base-files",
        "base-passwd",
        "bash",
        "coreutils",
        "cpio",
        "cpp",
        "dash",
        "debconf",
        "debianutils",
        "dpkg",
        "e2fsprogs",
        "gcc",
        "init-system-helpers",
        "iproute2",
        "kmod",
        "libc-bin",
        "libc6",
        "libcrypt-dev",
        "libgcrypt20",
        "libgssapi-krb5-2",
        "libpam-modules",
        "libpam-runtime",
        "libpam0g",
        "linux-base",
        "login",
        "mawk",
        "passwd",
        "perl-base",
        "procps",
        "psmisc",
        "python3",
        "python3-minimal",
        "readline-common",
        "tar",
        "tiny-initramfs",
        "usr-is-merged",
        "util-linux",
        "xz-utils",
    ]
)
#: The same, for packages that have a version in their names.
_CONFIGURED_VERSIONS = re.compile(r"linux-image-.*|(lib)?python3\.\d+(-minimal)?")

#: What update-alternatives is told: link, name, target, priority, and (link, name, target) of those that go with it.
#: Manual pages are not in the image, and update-alternatives leaves out links to what is not there.
_ALTERNATIVES: list[tuple[str, str, str, int, list[tuple[str, str, str]]]] = [
    ("/usr/bin/awk", "awk", "/usr/bin/mawk", 5, [
        ("/usr/bin/nawk", "nawk", "/usr/bin/mawk"),
    ]),
    ("/usr/bin/pager", "pager", "/bin/more", 50, []),
    ("/usr/bin/which", "which", "/usr/bin/which.debianutils", 0, []),
    ("/usr/sbin/rmt", "rmt", "/usr/sbin/rmt-tar", 50, []),
    ("/usr/bin/cc", "cc", "/usr/bin/gcc", 20, []),
    ("/usr/bin/c89", "c89", "/usr/bin/c89-gcc", 20, []),
    ("/usr/bin/c99", "c99", "/usr/bin/c99-gcc", 20, []),
    ("/lib/cpp", "cpp", "/usr/bin/cpp", 10, []),
    ("/usr/bin/lzma", "lzma", "/usr/bin/xz", 20, [
        ("/usr/bin/unlzma", "unlzma", "/usr/bin/unxz"),
        *((f"/usr/bin/lz{tool}", f"lz{tool}", f"/usr/bin/xz{tool}")
          for tool in ("cat", "more", "less", "diff", "cmp", "grep", "egrep", "fgrep")),
    ]),
]  # fmt: skip

#: Below the root of the tree, and with the time of day in it.
_ALTERNATIVES_LOG = "/alternatives.log"

#: PAM's common files as pam-auth-update makes them of the profile "Unix authentication": the first lines of their
#: primary and additional blocks, where "end" is what pam-auth-update counts.
_PAM: dict[str, tuple[str, str]] = {
    "auth": ("[success=end default=ignore]\tpam_unix.so nullok", ""),
    "account": ("[success=end new_authtok_reqd=done default=ignore]\tpam_unix.so", ""),
    "password": ("[success=end default=ignore]\tpam_unix.so obscure yescrypt", ""),
    "session": ("[default=1]\t\t\tpam_permit.so", "required\tpam_unix.so"),
    "session-noninteractive": ("[default=1]\t\t\tpam_permit.so", "required\tpam_unix.so"),
}

_EXCLUDED = ("/usr/share/man/", "/usr/share/locale/")
_INCLUDED = "/usr/share/locale/locale.alias"


def configured(package: str) -> bool:
    """Whether all that the maintainer scripts of ``package`` do is done by :func:`finish`."""
    return package in _CONFIGURED or _CONFIGURED_VERSIONS.fullmatch(package) is not None


def excluded(path: str) -> bool:
    """Whether a package's file is left out of images, as ``data/dpkg-excludes`` tells the guest's dpkg."""
    return path.startswith(_EXCLUDED) and path != _INCLUDED


#: The guest agent's archive.
AGENT = "/usr/lib/hva/agent.pyz"


def data(name: str) -> bytes:
    """A file of this package's ``data`` directory."""
    return resources.files("hva_images").joinpath("data", name).read_bytes()


def kernel_release(tree: Tree) -> str:
    """The release of the one kernel in ``tree``.

    :raise HostError: there is none, or more than one.
    """
    found = sorted(path.name for path in (tree.root / "usr/lib/modules").glob("*") if (path / "kernel").is_dir())
    if len(found) != 1:
        raise HostError(f"the packages hold {len(found) or 'no'} kernels{': ' + ', '.join(found) if found else ''}")
    return found[0]


def guest_python(tree: Tree) -> tuple[int, int]:
    """Major and minor version of the guest's Python.

    :raise HostError: there is none.
    """
    path = tree.root / "usr/bin/python3"
    match = re.fullmatch(r"python(\d+)\.(\d+)", str(path.readlink())) if path.is_symlink() else None
    if match is None:
        raise HostError("the packages hold no Python 3")
    return int(match[1]), int(match[2])


def finish(tree: Tree, name: str, agent: bytes) -> None:
    """Do for ``tree`` all that its packages and this project need, so that the guest ``name`` runs.

    :param agent: the guest agent's archive.
    """
    _accounts(tree)
    _files(tree)
    _pam(tree)
    _diversions(tree)
    _alternatives(tree)
    _python(tree)
    directory = tree.root / "usr/lib/modules" / kernel_release(tree)
    write_indexes(directory, read_modules(directory))
    _own(tree, name, agent)


def _accounts(tree: Tree) -> None:
    for kind in ("passwd", "group"):
        tree.default(f"/etc/{kind}", tree.read(f"/usr/share/base-passwd/{kind}.master"))
    # As shadowconfig makes them; the day of the last change is left empty, so that it is the same in every build.
    for kind, shadow, rest in (("passwd", "shadow", "::0:99999:7:::"), ("group", "gshadow", "::")):
        lines = [line.split(":") for line in tree.read(f"/etc/{kind}").decode().splitlines() if line]
        tree.write(f"/etc/{kind}", "".join(":".join([line[0], "x", *line[2:]]) + "\n" for line in lines))
        tree.default(f"/etc/{shadow}", "".join(f"{line[0]}:*{rest}\n" for line in lines), 0o640, gid=42)


def _files(tree: Tree) -> None:
    base = "/usr/share/base-files"
    for source, target in (("dot.profile", "/root/.profile"), ("dot.bashrc", "/root/.bashrc")):
        tree.default(target, tree.read(f"{base}/{source}"))
    tree.default("/etc/profile", tree.read(f"{base}/profile"))
    tree.default("/etc/motd", tree.read(f"{base}/motd"))
    tree.link("/etc/dpkg/origins/default", "debian")
    for path in ("/mnt", "/srv", "/opt", "/etc/opt", "/var/opt", "/media"):
        tree.directory(path)
    tree.directory("/var/mail", 0o2775, gid=8)
    tree.link("/var/spool/mail", "../mail")
    tree.link("/var/run", "/run")
    tree.link("/var/lock", "/run/lock")
    for path in ("", "/share", "/share/man", "/bin", "/games", "/lib", "/include", "/sbin", "/src", "/etc"):
        tree.directory(f"/usr/local{path}")
    tree.link("/usr/local/man", "share/man")
    for path, mode, gid in (("wtmp", 0o664, 43), ("btmp", 0o660, 43), ("lastlog", 0o664, 43), ("faillog", 0o644, 0)):
        tree.default(f"/var/log/{path}", "", mode, gid)
    for path in ("/etc/subuid", "/etc/subgid", "/etc/environment"):
        tree.default(path, "")
    tree.default("/etc/security/opasswd", "", 0o600)
    tree.default("/etc/modules", "# Kernel modules to load at boot time, one a line.\n")
    tree.default("/etc/shells", tree.read("/usr/share/debianutils/shells"))
    shells = tree.read("/etc/shells").decode().splitlines()
    for path in ("/bin/sh", "/bin/bash", "/bin/dash"):
        shells += [shell for shell in (path, f"/usr{path}") if shell not in shells]
    tree.write("/etc/shells", "".join(f"{line}\n" for line in shells))
    for source, target in (("libc-bin/nsswitch.conf", "/etc/nsswitch.conf"), ("readline/inputrc", "/etc/inputrc")):
        if tree.exists(f"/usr/share/{source}"):
            tree.default(target, tree.read(f"/usr/share/{source}"))


def _pam(tree: Tree) -> None:
    for kind, (primary, additional) in _PAM.items():
        head = kind.split("-")[0]
        variable = "session_nonint" if kind == "session-noninteractive" else kind
        text = tree.read(f"/usr/share/pam/common-{kind}").decode()
        for block, line in (("primary", primary), ("additional", additional)):
            shown = f"{head}\t{line.replace('success=end', 'success=1')} \n" if line else ""
            text = text.replace(f"${variable}_{block}\n", shown)
        tree.default(f"/etc/pam.d/common-{kind}", text)
        saved = [("unix" if "pam_unix" in line else "null", line) for line in (primary, additional) if line]
        tree.default(f"/var/lib/pam/{kind}", "".join(f"Module: {module}\n{line}\n" for module, line in saved))
    tree.default("/var/lib/pam/seen", "unix\n")


def _diversions(tree: Tree) -> None:
    # dash takes /bin/sh for itself, so that no other package ever replaces it.
    tree.link("/bin/sh.distrib", "dash")
    tree.write("/var/lib/dpkg/diversions", "/bin/sh\n/bin/sh.distrib\ndash\n")


def _alternatives(tree: Tree) -> None:
    for link, name, target, priority, slaves in _ALTERNATIVES:
        if not tree.exists(target):
            continue
        argv = ["update-alternatives", "--root", str(tree.root), "--log", _ALTERNATIVES_LOG, "--quiet"]
        argv += ["--install", link, name, target, str(priority)]
        argv += [word for slave in slaves for word in ("--slave", *slave)]
        run(argv, what="setting up alternatives", deadline=30)
    tree.remove(_ALTERNATIVES_LOG)


def _python(tree: Tree) -> None:
    version = "{}.{}".format(*guest_python(tree))
    tree.default(f"/etc/python{version}/sitecustomize.py", "# Empty sitecustomize.py to avoid a dangling symlink\n")
    tree.default("/etc/python3/debian_config", "[DEFAULT]\nbyte-compile = standard\n")
    tree.directory(f"/usr/local/lib/python{version}/dist-packages")
    tree.default(f"/var/lib/python/python{version}_installed", "")
    compile_python(tree)


def compile_python(tree: Tree) -> None:
    """Compile the guest's Python modules, as its packages would; left out where this Python is of another version."""
    major, minor = guest_python(tree)
    if sys.version_info[:2] != (major, minor):
        return
    places = [f"usr/lib/python{major}.{minor}", "usr/lib/python3/dist-packages", "usr/share/python3"]
    argv = [sys.executable, "-I", "-m", "compileall", "-q", "-j", "2", "-s", str(tree.root), "-p", "/"]
    argv += [str(tree.root / place) for place in places if (tree.root / place).is_dir()]
    run(argv, what="compiling the guest's Python modules", deadline=300)


def _own(tree: Tree, name: str, agent: bytes) -> None:
    """The project's own files."""
    for program in ("boot", "dhcp", "firstboot", "run-agent", "shutdown"):
        tree.write(f"/usr/lib/hva/{program}", data(program), 0o755)
    tree.write("/usr/lib/hva/network", data("network"))
    # Name servers are learnt when the guest boots, and it may have its root disk read-only.
    tree.link("/etc/resolv.conf", "/run/resolv.conf")
    tree.write(AGENT, agent)
    tree.write("/etc/inittab", data("inittab"))
    # busybox takes its part from the name it is called by. The link is not /sbin/init: that is a package's to own.
    tree.link("/usr/lib/hva/init", "/usr/bin/busybox")
    for program in ("poweroff", "reboot", "halt"):
        tree.link(f"/usr/local/sbin/{program}", "/usr/bin/busybox")
    tree.write("/etc/hostname", f"{name}\n")
    tree.write("/etc/hosts", f"127.0.0.1\tlocalhost {name}\n::1\tlocalhost ip6-localhost ip6-loopback\n")
    tree.write("/etc/dpkg/dpkg.cfg.d/hva-excludes", data("dpkg-excludes"))
    tree.write("/etc/fstab", data("fstab"))
    for path in ("pts", "shm"):
        tree.directory(f"/usr/lib/hva/dev/{path}")
    for path, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        tree.link(f"/usr/lib/hva/dev/{path}", f"/proc/self/{target}")
    tree.write("/etc/machine-id", "")


def kernel_image(tree: Tree) -> Path:
    """The kernel that QEMU loads."""
    return tree.root / "boot" / f"vmlinuz-{kernel_release(tree)}"
