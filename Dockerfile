# The operator's image. Build from the repository's root: docker build -t dsft-operator .
# Any base with Python 3.11 and its venv module will do.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# The tools that build and install. They are mounted below where they are needed, and are not in the image.
FROM ${BASE_IMAGE} AS tools
# For machines behind a package mirror or a proxy with a CA of its own. An ARG is not kept in the image.
ARG PIP_INDEX_URL
ARG PIP_CERT
COPY requirements/uv.txt requirements/build.txt /tmp/
RUN python3 -m venv /opt/tools \
 && /opt/tools/bin/pip install --no-cache-dir --no-deps --require-hashes -r /tmp/uv.txt -r /tmp/build.txt

FROM tools AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
COPY trainer_image trainer_image
RUN /opt/tools/bin/hatchling build --target wheel --directory /wheel

FROM ${BASE_IMAGE}
ARG UV_DEFAULT_INDEX
ARG SSL_CERT_FILE
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN useradd --uid 65532 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin dsft
# Dependencies in a layer of their own, below the code: they change seldom and are large. Bytecode is compiled now, because
# the user can't write it later, and each start would compile again.
COPY requirements/operator.txt /opt/requirements/
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    /opt/tools/bin/uv venv --quiet --no-cache --python python3 /opt/venv \
 && /opt/tools/bin/uv pip install --quiet --no-cache --compile-bytecode --require-hashes \
    --python /opt/venv/bin/python -r /opt/requirements/operator.txt
# Copied, not mounted: not every builder builds again when what it mounts has changed.
COPY --from=wheel /wheel /opt/wheel
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    /opt/tools/bin/uv pip install --quiet --no-cache --compile-bytecode --no-deps \
    --python /opt/venv/bin/python /opt/wheel/*.whl
USER 65532:65532
ENTRYPOINT ["python", "-m", "dsft_operator"]
