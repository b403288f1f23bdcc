# The operator's image. Build from the repository's root: docker build -t dsft-operator .
# Any base with Python 3.11 and its venv module will do, and any builder.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# What builds our own packages. None of it is in the image.
FROM ${BASE_IMAGE} AS code
# For machines behind a package mirror or a proxy with a CA of its own. An ARG is not kept in the image.
ARG PIP_INDEX_URL
ARG PIP_CERT
COPY requirements/uv.txt requirements/build.txt /tmp/
RUN python3 -m venv /opt/tools \
 && /opt/tools/bin/pip install --no-cache-dir --no-deps --require-hashes -r /tmp/uv.txt -r /tmp/build.txt
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
COPY trainer_image trainer_image
RUN /opt/tools/bin/hatchling build --target wheel --directory /wheel \
 && /opt/tools/bin/uv pip install --quiet --no-cache --no-deps --python python3 --target /code /wheel/*.whl

FROM ${BASE_IMAGE}
ARG PIP_INDEX_URL
ARG PIP_CERT
ARG UV_DEFAULT_INDEX
ARG SSL_CERT_FILE
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN useradd --uid 65532 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin dsft
# Dependencies in a layer of their own, below the code: they change seldom and are large. Bytecode is compiled now, because
# the user can't write it later, and each start would compile again. The installer goes in the layer that it came with.
COPY requirements/uv.txt requirements/operator.txt /opt/requirements/
RUN python3 -m venv /opt/installer \
 && /opt/installer/bin/pip install --quiet --no-cache-dir --no-deps --require-hashes -r /opt/requirements/uv.txt \
 && /opt/installer/bin/uv venv --quiet --no-cache --python python3 /opt/venv \
 && /opt/installer/bin/uv pip install --quiet --no-cache --compile-bytecode --require-hashes \
    --python /opt/venv/bin/python -r /opt/requirements/operator.txt \
 && rm -rf /opt/installer
COPY --from=code /code /opt/venv/lib/python3.11/site-packages
RUN python -m compileall -q /opt/venv/lib/python3.11/site-packages/dsft_api /opt/venv/lib/python3.11/site-packages/dsft_operator
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="dsft-operator" \
      org.opencontainers.image.description="The operator of dsft" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 65532:65532
ENTRYPOINT ["python", "-m", "dsft_operator"]
