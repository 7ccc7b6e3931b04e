# valohai-fuse in a virtual environment of its own, /opt/valohai-fuse, on Debian 12. Use it as it is (docker run --device /dev/fuse
# --cap-add SYS_ADMIN ...), or copy that directory into an image of yours that is based on Debian 12 too; README shows the lines.
FROM debian:12-slim AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev libfuse3-dev pkg-config python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md LICENSE /src/
COPY requirements/constraints.txt /src/requirements/
COPY src /src/src
RUN python3 -m venv /opt/valohai-fuse \
 && /opt/valohai-fuse/bin/pip install --no-cache-dir --constraint /src/requirements/constraints.txt /src \
 && /opt/valohai-fuse/bin/valohai-fuse --version

FROM debian:12-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates fuse3 python3 \
 && rm -rf /var/lib/apt/lists/* \
 && ln -s /opt/valohai-fuse/bin/valohai-fuse /usr/local/bin/
COPY --from=build /opt/valohai-fuse /opt/valohai-fuse
ENTRYPOINT ["valohai-fuse"]
CMD ["--help"]
