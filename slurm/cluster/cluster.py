#!/usr/bin/env python3
"""Run a real SLURM on one Debian machine, for development and tests: two nodes, fake GPUs, accounting, preemption.

    slurm/cluster/cluster.py up [--dir DIR] [--no-accounting]     as root; prints the line to set SLURM_CONF with
    slurm/cluster/cluster.py down [--dir DIR]                     stops all of it and removes DIR

Outside of DIR only /etc/hosts changes: programs look nodes up by name; `down` removes the line. Partitions: `low`
(the default; `high` preempts and requeues its jobs), `grace` (as low, with 20 s of grace), `high`. Needs the packages
slurmctld slurmd slurm-client slurmdbd munge mariadb-server (22.05 was used).
"""

import argparse
import contextlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("fashion-n1", "fashion-n2")
HOSTS = Path("/etc/hosts")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
PACKAGES = "slurmctld slurmd slurm-client slurmdbd munge mariadb-server"
ACCOUNTING = ("mariadbd", "mariadb-install-db", "slurmdbd", "sacctmgr")

SLURM_CONF = """\
ClusterName=fashion
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
KillWait={kill_wait}
InactiveLimit=0
MinJobAge=300
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{accounting}
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1
PartitionName=grace Nodes=ALL PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=16000 Gres=gpu:4"
WITH_ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={dir}/munge/socket
AccountingStorageTRES=gres/gpu
JobAcctGatherType=jobacct_gather/linux"""
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
LogFile={dir}/slurmdbd.log
PidFile={dir}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""


def why_impossible(accounting: bool = True) -> str:
    """Return why no cluster can run here, or "" where one can."""
    missing = [p for p in (*PROGRAMS, *(ACCOUNTING if accounting else ())) if shutil.which(p) is None]
    if missing:
        return f"these programs are missing: {', '.join(missing)} (apt-get install {PACKAGES})"
    return "" if os.geteuid() == 0 else "it must run as root"


class Cluster:
    def __init__(self, folder: Path):
        self.dir = folder.resolve()
        self.conf = self.dir / "slurm.conf"
        self.mark = f"# fashion_ddp {self.dir}"

    def up(self, accounting: bool = True, kill_wait: int = 20) -> None:
        if why := why_impossible(accounting):
            sys.exit(f"error: no cluster can run here: {why}")
        if self.dir.exists() and any(self.dir.iterdir()):
            sys.exit(f"error: {self.dir} is not empty: `cluster.py down --dir {self.dir}` first, or another --dir")
        self.dir.mkdir(parents=True, exist_ok=True)
        self.dir.chmod(0o755)
        try:
            self._start(accounting, kill_wait)
        except BaseException:
            for log in sorted(self.dir.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text()[-1500:]}", file=sys.stderr)
            self.down()
            raise

    def _start(self, accounting: bool, kill_wait: int) -> None:
        values = {"dir": self.dir, "host": socket.gethostname(), "kill_wait": kill_wait}
        ctld_port, dbd_port, sql_port, *of_nodes = _free_ports(3 + len(NODES))
        values |= {"ctld_port": ctld_port, "dbd_port": dbd_port, "sql_port": sql_port}
        self.name_nodes(True)
        self._munge()
        if accounting:
            self._database(values)
        nodes = [NODE.format(name=n, host=values["host"], port=p) for n, p in zip(NODES, of_nodes, strict=True)]
        with_accounting = WITH_ACCOUNTING.format(**values) if accounting else ""
        self.conf.write_text(SLURM_CONF.format(**values, nodes="\n".join(nodes), accounting=with_accounting))
        # SLURM wants a device per GPU. Every machine has these terminals, and nothing opens them.
        (self.dir / "gres.conf").write_text("Name=gpu File=/dev/tty[10-13]\n")
        (self.dir / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.dir / "state").mkdir()
        if accounting:
            self._run("sacctmgr", "-i", "add", "cluster", "fashion")
        self._run("slurmctld", "-f", str(self.conf))
        _wait("slurmctld answers", lambda: self._succeeds("scontrol", "ping"))
        for name in NODES:
            (self.dir / f"spool-{name}").mkdir()
            self._run("slurmd", "-f", str(self.conf), "-N", name)
        _wait("both nodes are idle", lambda: self._output("sinfo", "-h", "-p", "low", "-o", "%T %D") == "idle 2")

    def name_nodes(self, resolvable: bool) -> None:
        """Add the nodes' names to /etc/hosts, or remove them."""
        lines = [line for line in HOSTS.read_text().splitlines() if not line.endswith(self.mark)]
        text = "\n".join([*lines, *[f"127.0.0.1 {' '.join(NODES)} {self.mark}"] * resolvable, ""])
        with open(HOSTS, "r+") as file:  # never empty: whoever else looks a name up meanwhile finds it
            file.write(text)
            file.truncate()

    def _munge(self) -> None:
        folder = self.dir / "munge"
        folder.mkdir(mode=0o755)
        key = folder / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        user = pwd.getpwnam("munge")
        for path in (folder, key):
            os.chown(path, user.pw_uid, user.pw_gid)
        arguments = [f"--key-file={key}", f"--socket={folder}/socket", f"--pid-file={folder}/pid"]
        arguments += [f"--log-file={folder}/log", f"--seed-file={folder}/seed", "--num-threads=4"]
        self._run("munged", *arguments, user="munge")

    def _database(self, values: dict[str, object]) -> None:
        folder = self.dir / "sql"
        folder.mkdir(mode=0o700)
        user = pwd.getpwnam("mysql")
        os.chown(folder, user.pw_uid, user.pw_gid)
        data, sock = f"--datadir={folder}/data", f"--socket={folder}/socket"
        self._run(
            "mariadb-install-db", "--no-defaults", data, "--user=mysql", "--auth-root-authentication-method=normal"
        )
        arguments = ["--no-defaults", data, sock, f"--port={values['sql_port']}", "--bind-address=127.0.0.1"]
        arguments += [f"--pid-file={folder}/pid", "--user=mysql", f"--log-error={folder}/log"]
        arguments += ["--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=2"]
        subprocess.Popen(["mariadbd", *arguments], stdin=subprocess.DEVNULL, start_new_session=True)
        client = ["mariadb", "--no-defaults", sock, "-u", "root"]
        _wait("the database answers", lambda: self._succeeds(*client, "-e", "select 1"))
        grants = "create database slurm_acct_db; create user slurm@'127.0.0.1' identified by 'slurm'; "
        self._run(*client, "-e", grants + "grant all on slurm_acct_db.* to slurm@'127.0.0.1';")
        conf = self.dir / "slurmdbd.conf"
        conf.write_text(SLURMDBD_CONF.format(**values))
        conf.chmod(0o600)
        # slurmdbd and sacctmgr read slurmdbd.conf beside slurm.conf.
        self.conf.write_text(SLURM_CONF.format(**values, nodes="", accounting=WITH_ACCOUNTING.format(**values)))
        self._run("slurmdbd")
        _wait("slurmdbd answers", lambda: _is_listening(int(str(values["dbd_port"]))))

    def down(self) -> None:
        """Stop the jobs and the daemons, and remove all files."""
        if self.conf.exists():
            self._succeeds("scancel", "--full", "--user=root", "--signal=KILL")
            self._succeeds("scancel", "--user=root")
        names = [f"slurmd-{name}.pid" for name in NODES]
        for name in (*names, "slurmctld.pid", "slurmdbd.pid", "sql/pid", "munge/pid"):
            with contextlib.suppress(OSError, ValueError):
                pid = int((self.dir / name).read_text())
                os.kill(pid, signal.SIGTERM)
                _wait(f"{name} ends", lambda pid=pid: not _is_alive(pid), patience=30, give_up=False)
                if _is_alive(pid):
                    os.kill(pid, signal.SIGKILL)
        for pid in _leftover_processes(self.dir):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.name_nodes(False)
        shutil.rmtree(self.dir, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        return {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | {"SLURM_CONF": str(self.conf)}

    def _run(self, *words: str, user: str | None = None) -> None:
        done = self._call(*words, user=user)
        if done.returncode:
            sys.exit(f"error: {' '.join(words)} failed: {done.stdout}{done.stderr}")

    def _succeeds(self, *words: str) -> bool:
        return self._call(*words).returncode == 0

    def _output(self, *words: str) -> str:
        return self._call(*words).stdout.strip()

    def _call(self, *words: str, user: str | None = None) -> subprocess.CompletedProcess[str]:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.run(words, check=False, env=self._environment(), text=True, user=user, **streams)


def _wait(what: str, holds: Callable[[], bool], patience: float = 60, give_up: bool = True) -> None:
    limit = time.monotonic() + patience
    while not holds():
        if time.monotonic() > limit:
            if give_up:
                sys.exit(f"error: waited {patience:.0f} s until {what}: it did not happen")
            return
        time.sleep(0.1)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _leftover_processes(folder: Path) -> list[int]:
    """Return the processes of this cluster's jobs that outlived its daemons."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"SLURM_CONF={folder}/slurm.conf".encode() in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
    return [pid for pid in found if pid not in (os.getpid(), os.getppid()) and b"SLURM_JOB_ID" in _environ(pid)]


def _environ(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    """Return ports where nobody listens. They lie below those that Linux and launchers give out, so that none is taken
    by something else in the seconds before a daemon listens there."""
    found: list[int] = []
    for port in random.sample(range(6000, 10_000), 4000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["up", "down"])
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp/fashion_ddp_slurm"))
    parser.add_argument("--no-accounting", dest="accounting", action="store_false")
    parser.add_argument("--kill-wait", type=int, default=20, help="seconds from SIGTERM to SIGKILL (SLURM's own is 30)")
    arguments = parser.parse_args()
    cluster = Cluster(arguments.dir)
    if arguments.what == "up":
        cluster.up(arguments.accounting, arguments.kill_wait)
        print(f"export SLURM_CONF={cluster.conf}")
    else:
        cluster.down()


if __name__ == "__main__":
    main()
