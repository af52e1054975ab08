"""Images, built and run as a cluster would run them: `make image-check`."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version
from rich.console import Console

import ostinato

from tests.demo.show import show
from tests.image.pairs import MEMORY_BYTES, Images, Pair, as_a_pod, by_hand
from tests.image.podman import base, build, download, have_tools, podman, run
from tests.image.test_dockerfile import locked
from tests.k8s.manifests import built, containers

pytestmark = [pytest.mark.image, pytest.mark.timeout(0)]

SIDECAR_BYTES_MAX = 150_000_000
"""Beyond the base."""
TOKENS = 300
"""Of an answer that takes some seconds."""


@pytest.fixture(name="images", scope="module")
def _images() -> Images:
    have_tools()
    download("sidecar", "service", "smollm2", "sbom")
    found = base()
    return Images(found, build("sidecar", found), build("service", found))


@pytest.fixture(name="pair", scope="module")
def _pair(images: Images) -> Iterator[Pair]:
    with by_hand(images) as pair:
        yield pair


def test_images_are_small(images: Images) -> None:
    """The sidecar adds less than 150 MB to its base."""
    names = (images.base, images.sidecar, images.service)
    sizes = {name: int(podman("image", "inspect", name, "--format={{.Size}}")) for name in names}
    print("\n".join(f"{name}: {size / 1e6:.0f} MB" for name, size in sizes.items()))

    assert sizes[images.sidecar] - sizes[images.base] < SIDECAR_BYTES_MAX


@pytest.mark.parametrize("program", ["service", "sidecar"])
def test_an_image_lists_what_is_in_it(images: Images, program: str) -> None:
    """The file that the label names is a CycloneDX list of this project's version and of exactly the pinned packages."""
    [image] = json.loads(podman("image", "inspect", getattr(images, program)))
    listed = json.loads(
        podman("run", "--rm", "--entrypoint", "cat", getattr(images, program), image["Labels"]["ostinato.sbom"])
    )
    pins = locked(program) | (locked("smollm2") if program == "service" else {})

    assert listed["bomFormat"] == "CycloneDX"
    assert listed["metadata"]["component"]["version"] == ostinato.__version__
    assert {canonicalize_name(each["name"]): Version(each["version"]) for each in listed["components"]} == pins


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


async def test_the_pair_keeps_its_promises(pair: Pair) -> None:
    """The demo's batches, from outside: seeded answers are equal, unseeded ones differ, receipts verify, a replay matches."""
    assert await show(pair.target, Console(width=140)), pair.log()


@pytest.mark.parametrize("program", ["service", "sidecar"])
def test_it_may_do_nothing_else(pair: Pair, program: str) -> None:
    """No capability, no way to gain one, no user but its own, no file of its image to write to, and a limit of memory."""
    asked = (
        "import errno\n"
        "status = dict(line.split(':\\t') for line in open('/proc/1/status').read().splitlines() if ':\\t' in line)\n"
        "try: open('/app/x', 'w')\n"
        "except OSError as error: written = errno.errorcode[error.errno]\n"
        "print(status['CapEff'], status['CapBnd'], status['NoNewPrivs'], status['Seccomp'], status['Uid'].split()[0], written)"
    )
    said = podman("exec", getattr(pair, program), "python", "-c", asked).split()

    assert said == ["0" * 16, "0" * 16, "1", "2", "10001", "EROFS"]
    assert int(podman("inspect", getattr(pair, program), "--format={{.HostConfig.Memory}}")) == MEMORY_BYTES[program]


def test_probes_by_exec(pair: Pair) -> None:
    """Both programs, their services, and one that does not exist."""
    assert pair.probe("service").returncode == 0
    assert pair.probe("service", "ostinato.v1.Engine").returncode == 0
    assert pair.probe("sidecar").returncode == 0
    assert pair.probe("sidecar", "ostinato.v1.Sequencer").stdout.startswith("SERVING")
    assert pair.probe("sidecar", "ostinato.v1.Engine").returncode == 1


async def test_the_pod_stops_as_a_cluster_stops_it(images: Images) -> None:
    """The manifest's hook in the sidecar and SIGTERM to the service come at the same moment, under load: what was admitted is
    answered, nothing new is, both end with 0, and the SIGTERM that the sidecar then gets changes nothing."""
    hook = containers(built(()))["sidecar"]["lifecycle"]["preStop"]["exec"]["command"]
    with as_a_pod(images) as pair:
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
