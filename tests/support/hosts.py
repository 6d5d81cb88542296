"""Build hosts that are connected by a network, from Linux namespaces.

A host has its own network interface, host name, process ids, ``/etc/hosts`` and working directory, and some of the
machine's cores. A bridge connects the hosts. They share all files, except those in the folder ``Lab.local_disk``.

All hosts end together with the process that built them, even if it is killed. Several processes can build hosts at the
same time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from data_tools.errors import UserError
from pipeline.distributed.cpu import split_cores

COMMANDS = ("hostname", "ip", "mount", "nsenter", "taskset", "tc", "unshare")
BRIDGE = "bridge0"
#: The kernel repeats a packet this many times before it gives up a connection, which then takes about 25 s. By default,
#: it repeats a packet 15 times, which takes 15 minutes. A launcher that has lost its store waits for this time.
TCP_RETRIES = 6
#: The options of ``unshare`` for a host. If ``unshare`` ends, the kernel kills all processes of the host.
_HOST_NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
#: The first process of the switch and of a host. It ends when its standard input is closed.
_SWITCH = f"ip link add {BRIDGE} type bridge && ip link set {BRIDGE} up && echo ready && read _"
_HOST = (
    'hostname "$1" && mount --bind "$2" /etc/hosts && mount -t tmpfs local "$3" && ip link set lo up '
    f"&& echo {TCP_RETRIES} > /proc/sys/net/ipv4/tcp_retries2 && echo ready && read _"
)
START_S = 30


class NamespacesError(UserError):
    """The hosts cannot be built on this machine."""


class Lab:
    """A switch and the hosts that are connected to it, as a context manager.

    Args:
        folder: a folder for the files of the hosts.
        names_are_loopback: whether the name of a host resolves to 127.0.1.1 on this host, as on Debian and Ubuntu.

    Raises:
        NamespacesError: this machine does not allow namespaces, or a command is missing.
    """

    def __init__(self, hosts: int, folder: Path, *, names_are_loopback: bool = False) -> None:
        check_commands()
        self.folder = folder
        self.names_are_loopback = names_are_loopback
        self.local_disk = folder / "local_disk"
        self.local_disk.mkdir(parents=True)
        self._uses_user_namespace = os.geteuid() != 0
        user = ("--user", "--map-root-user") if self._uses_user_namespace else ()
        self._processes = ExitStack()
        with ExitStack() as failed:
            failed.push(self)
            self._switch = FirstProcess(["unshare", *user, "--net", "sh", "-c", _SWITCH])
            self._processes.callback(self._switch.kill)
            self.hosts = [Host(self, number, hosts) for number in range(hosts)]
            for host in self.hosts:
                self._processes.callback(host.kill)
                host.boot()
            failed.pop_all()

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.close()

    def entering(self, pid: int, *namespaces: str) -> list[str]:
        """Return the beginning of a command that runs in namespaces of a process."""
        user = ("--user", "--preserve-credentials") if self._uses_user_namespace else ()
        return ["nsenter", "--target", str(pid), *user, *namespaces, "--"]

    @property
    def in_switch(self) -> list[str]:
        return self.entering(self._switch.pid, "--net")


class Host:
    """A host: ``node0``, ``node1`` and so on."""

    def __init__(self, lab: Lab, number: int, hosts: int) -> None:
        self.lab = lab
        self.cores = split_cores(sorted(os.sched_getaffinity(0)), number, hosts)
        self.name = f"node{number}"
        self.address = f"10.0.0.{number + 1}"
        self.mac_address = f"02:00:00:00:00:{number + 1:02x}"  # the other hosts remember it for some time
        self.port = f"port{number}"  # of the switch
        self.working_dir = lab.folder / self.name
        self.working_dir.mkdir()
        self._first: FirstProcess | None = None

    def boot(self) -> None:
        """Start the host, and connect it to the switch."""
        lab, names = self.lab, self.working_dir / "hosts"
        others = "".join(f"{self._address_of(host)} {host.name}\n" for host in lab.hosts)
        names.write_text(f"127.0.0.1 localhost\n{others}")
        script = ["sh", "-c", _HOST, "sh", self.name, str(names), str(lab.local_disk)]
        self._first = FirstProcess([*lab.in_switch, "unshare", *_HOST_NAMESPACES, *script], is_forked=True)
        # The kernel deletes the port of a dead host a moment later.
        subprocess.run([*lab.in_switch, "ip", "link", "delete", self.port], capture_output=True)
        cable = ["ip", "link", "add", self.port, "type", "veth", "peer", "name", "eth0", "address", self.mac_address]
        _run([*lab.in_switch, *cable, "netns", str(self._first.pid)])
        _run([*lab.in_switch, "ip", "link", "set", self.port, "master", BRIDGE, "up"])
        _run(self.command(["ip", "address", "add", f"{self.address}/24", "dev", "eth0"]))
        _run(self.command(["ip", "link", "set", "eth0", "up"]))

    def _address_of(self, host: Host) -> str:
        return "127.0.1.1" if host is self and self.lab.names_are_loopback else host.address

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return a command that runs a program on this host, in the working directory of the host."""
        assert self._first, "the host is off"
        entering = self.lab.entering(self._first.pid, "--net", "--uts", "--mount", "--pid")
        entering = ["taskset", "--cpu-list", ",".join(map(str, self.cores)), *entering]
        return [*entering, "sh", "-c", 'cd "$0" && exec "$@"', str(self.working_dir), *arguments]

    def cut(self) -> None:
        """Cut the link to the switch. The other hosts receive no message about it."""
        _run([*self.lab.in_switch, "ip", "link", "set", self.port, "down"])

    def restore(self) -> None:
        _run([*self.lab.in_switch, "ip", "link", "set", self.port, "up"])

    def limit(self, megabits: int) -> None:
        """Limit the link to the switch, in both directions, to a number of Mbit/s."""
        rate = ["htb", "rate", f"{megabits}mbit", "burst", "64kb", "cburst", "64kb"]
        for command, device in ((self.lab.in_switch, self.port), (self.command([]), "eth0")):
            _run([*command, "tc", "qdisc", "add", "dev", device, "root", "handle", "1:", "htb", "default", "1"])
            _run([*command, "tc", "class", "add", "dev", device, "parent", "1:", "classid", "1:1", *rate])

    def kill(self) -> None:
        """Kill all processes of this host. Its kernel closes their connections."""
        if self._first:
            self._first.kill()
            self._first = None

    def power_off(self) -> None:
        """Make this host vanish: no process of it can send anything to another host."""
        self.cut()
        self.kill()


class FirstProcess:
    """The first process in new namespaces.

    Args:
        is_forked: whether ``unshare`` starts the first process as its child.
    """

    def __init__(self, command: Sequence[str], *, is_forked: bool = False) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C must not end the host before the program that uses it
        )
        assert self._process.stdout
        line = self._process.stdout.readline().strip()
        if line != "ready":
            self._process.kill()
            self._process.wait()
            raise NamespacesError(
                f"this machine does not allow network namespaces ({line or 'unshare failed'}); run the command as "
                "root, or on a machine where `unshare --user --map-root-user --net true` works"
            )
        unshare = psutil.Process(self._process.pid)
        self.pid: int = unshare.children()[0].pid if is_forked else unshare.pid

    def kill(self) -> None:
        """Kill all processes of the process namespace."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, 9)
        self._process.communicate()


def check_commands() -> None:
    """Raise NamespacesError if this machine does not have Linux, or lacks a command that builds hosts."""
    if sys.platform != "linux":
        raise NamespacesError("the hosts are Linux namespaces; run the command on Linux")
    if missing := [command for command in COMMANDS if not shutil.which(command)]:
        raise NamespacesError(
            f"commands are missing: {', '.join(missing)}; install the packages iproute2 and util-linux, or add "
            "/usr/sbin to PATH"
        )


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=START_S)
    if result.returncode:
        program = " ".join(command[command.index("--") + 1 :])
        raise NamespacesError(f"`{program}` failed: {result.stderr.strip()}")
