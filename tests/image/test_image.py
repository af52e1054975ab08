"""Images, built and run as a cluster would run them: `make image-check`."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from rich.console import Console

import ostinato

from tests.demo.show import show
from tests.image.podman import base, build, download, have_tools, podman, run
from tests.k8s.manifests import built, containers

pytestmark = [pytest.mark.image, pytest.mark.timeout(0)]

MIB = 1 << 20
SIDECAR_BYTES_MAX = 150 * MIB
"""Beyond the base."""
HARDENED = (
    "--read-only", "--tmpfs=/tmp:rw,size=64m,mode=1777", "--cap-drop=all", "--security-opt=no-new-privileges", "--network=host",
    "--no-healthcheck", "--pids-limit=256",
)  # fmt: skip
SHELLS = tuple(f"--volume=/dev/null:/usr/bin/{name}:ro" for name in ("dash", "bash"))
"""There is none where these lie over them: whatever would start one fails."""
MEMORY = {"service": 2048 * MIB, "sidecar": 1024 * MIB}
"""As in the manifests."""
TOKENS = 300
"""Of an answer that takes some seconds."""


@dataclass(frozen=True)
class Images:
    """Names."""

    base: str
    sidecar: str
    service: str


@pytest.fixture(name="images", scope="module")
def _images() -> Images:
    have_tools()
    download("sidecar", "service", "smollm2")
    found = base()
    return Images(found, build("sidecar", found), build("service", found))


class Containers:
    """The pair, from its images. Only the socket is shared; each has a volume of its own for what it keeps."""

    def __init__(self, images: Images, name: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.target = f"127.0.0.1:{taken.getsockname()[1]}"
        self.service, self.sidecar = f"{name}-service", f"{name}-sidecar"
        self.volumes = [f"{name}-{what}" for what in ("socket", "journal", "state")]
        self._images = images

    def start(self, *service: str) -> None:
        """Both, in no order that matters; the service with these variables besides."""
        for volume in self.volumes:
            options = ("type=tmpfs", "device=tmpfs", "o=uid=10001,gid=10001,mode=0770")
            podman("volume", "create", *(f"--opt={option}" for option in options), volume)
        _, journal, state = self.volumes
        self._run("sidecar", journal, f"OSTINATO_SIDECAR_LISTEN={self.target}", "OSTINATO_SIDECAR_METRICS=127.0.0.1:0")
        self._run("service", state, "OSTINATO_SERVICE_METRICS=127.0.0.1:0", *service)

    def _run(self, program: str, own: str, *environment: str) -> None:
        image, memory = getattr(self._images, program), MEMORY[program]
        podman(
            "run", "--detach", "--name", getattr(self, program), *HARDENED, *SHELLS,
            f"--memory={memory}", f"--memory-swap={memory}",
            f"--volume={self.volumes[0]}:/run/ostinato", f"--volume={own}:/var/lib/ostinato",
            *(f"--env={variable}" for variable in environment), image,
        )  # fmt: skip

    def probe(self, program: str, service: str = "") -> subprocess.CompletedProcess[str]:
        """By exec, as a cluster does."""
        command = ["podman", "exec", getattr(self, program), "python", "-m", program, "probe", *filter(None, [service])]
        return run(*command, check=False)

    def log(self) -> str:
        """The ends of both."""
        return "\n".join(run("podman", "logs", "--tail=20", name, check=False).stderr for name in (self.service, self.sidecar))

    def remove(self) -> None:
        """Whatever is left."""
        run("podman", "rm", "--force", "--time=0", self.service, self.sidecar, check=False)
        run("podman", "volume", "rm", "--force", *self.volumes, check=False)


@contextlib.contextmanager
def running(images: Images, name: str, *service: str) -> Iterator[Containers]:
    """A pair that can admit."""
    pair = Containers(images, name)
    pair.remove()
    try:
        pair.start(*service)
        until(lambda: pair.probe("sidecar", "ostinato.v1.Generation").returncode == 0, pair.log)
        yield pair
    finally:
        pair.remove()


def until(holds: Callable[[], bool], why_not: Callable[[], str], seconds: float = 600) -> None:
    """Wait for it, and fail with what `why_not` says."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, why_not()
        time.sleep(0.2)


@pytest.fixture(name="pair", scope="module")
def _pair(images: Images) -> Iterator[Containers]:
    with running(images, "ostinato-check") as pair:
        yield pair


def test_images_are_small(images: Images) -> None:
    """The sidecar adds less than 150 MiB to its base."""
    sizes = {
        name: int(podman("image", "inspect", name, "--format={{.Size}}"))
        for name in (images.base, images.sidecar, images.service)
    }
    print("\n".join(f"{name}: {size / 1e6:.0f} MB" for name, size in sizes.items()))

    assert sizes[images.sidecar] - sizes[images.base] < SIDECAR_BYTES_MAX


@pytest.mark.parametrize("program", ["service", "sidecar"])
def test_an_image_says_how_it_is_run(images: Images, program: str) -> None:
    """No root, no shell in front of the program, an orderly signal, and a health command."""
    [image] = json.loads(podman("image", "inspect", getattr(images, program)))

    assert image["Config"]["User"] == "10001:10001"
    assert image["Config"]["Entrypoint"] == ["python", "-m", program]
    assert image["Config"]["StopSignal"] == "SIGTERM"
    assert image["Healthcheck"]["Test"] == ["CMD", "python", "-m", program, "probe"]
    assert image["Labels"]["org.opencontainers.image.version"] == ostinato.__version__
    assert image["Labels"]["org.opencontainers.image.title"] == f"ostinato-{program}"


async def test_the_pair_keeps_its_promises(pair: Containers) -> None:
    """The demo's batches, from outside: seeded answers are equal, unseeded ones differ, receipts verify, a replay matches."""
    assert await show(pair.target, Console(width=140)), pair.log()


@pytest.mark.parametrize("program", ["service", "sidecar"])
def test_it_may_do_nothing_else(pair: Containers, program: str) -> None:
    """No capability, no way to gain one, no user but its own, no file of its image to write to, and a limit of memory."""
    asked = (
        "import errno, os\n"
        "status = dict(line.split(':\\t') for line in open('/proc/1/status').read().splitlines() if ':\\t' in line)\n"
        "try: open('/app/x', 'w')\n"
        "except OSError as error: written = errno.errorcode[error.errno]\n"
        "print(status['CapEff'], status['CapBnd'], status['NoNewPrivs'], status['Seccomp'], status['Uid'].split()[0], written)"
    )
    said = podman("exec", getattr(pair, program), "python", "-c", asked).split()

    assert said == ["0" * 16, "0" * 16, "1", "2", "10001", "EROFS"]
    assert int(podman("inspect", getattr(pair, program), "--format={{.HostConfig.Memory}}")) == MEMORY[program]


def test_probes_by_exec(pair: Containers) -> None:
    """Both programs, their services, and one that does not exist."""
    assert pair.probe("service").returncode == 0
    assert pair.probe("service", "ostinato.v1.Engine").returncode == 0
    assert pair.probe("sidecar").returncode == 0
    assert pair.probe("sidecar", "ostinato.v1.Sequencer").stdout.startswith("SERVING")
    assert pair.probe("sidecar", "ostinato.v1.Engine").returncode == 1


async def test_stopped_as_a_cluster_stops_it(images: Images) -> None:
    """The manifest's hook in the sidecar and SIGTERM to the service come at the same moment, under load: what was admitted is
    answered, nothing new is, the service ends first, and the SIGTERM that the sidecar then gets changes nothing."""
    hook = containers(built(()))["sidecar"]["lifecycle"]["preStop"]["exec"]["command"]
    with running(images, "ostinato-check-stop", "OSTINATO_SERVICE_SELF_TEST=off") as pair:
        async with ostinato.Client(pair.target) as client:
            answer = client.stream("Once upon a time", seed=1, max_new_tokens=TOKENS, ignore_eos=True)
            assert (await anext(answer)).HasField("admitted")
            podman("exec", pair.sidecar, *hook)
            podman("kill", "--signal=TERM", pair.service)
            with pytest.raises(ostinato.OstinatoError):
                await client.generate("too late", timeout=10)
            finished = [event.finished async for event in answer if event.HasField("finished")]
        assert [len(result.output.token_ids) for result in finished] == [TOKENS]
        assert podman("wait", pair.service) == "0", pair.log()
        run("podman", "kill", "--signal=TERM", pair.sidecar, check=False)  # it may have ended already
        assert podman("wait", pair.sidecar) == "0", pair.log()
