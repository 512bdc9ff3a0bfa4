# Two images from one file: `api` answers HTTP and has no torch, `worker` holds the model.
#
#   docker build --target api -t palimpsest-api .
#   docker build --target worker -t palimpsest-worker .
#   docker build --target worker -t palimpsest-worker --build-arg TORCH_INDEX=ADDRESS .
#
# ADDRESS is a package index with the builds of torch for your CPU or GPU. Without it, torch comes from the default index.
# It is used beside the default index; constraints.txt pins the version either way.

ARG PYTHON=3.11.14-slim-bookworm

# The interpreter, a user with two writable folders, and the script of the health check.
FROM python:${PYTHON} AS base
RUN groupadd --gid 10001 palimpsest \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/palimpsest --shell /usr/sbin/nologin palimpsest \
    && install -d -o palimpsest -g palimpsest -m 0700 /var/lib/palimpsest /var/cache/palimpsest
ENV PATH=/opt/palimpsest/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    PALIMPSEST_DATA_DIR=/var/lib/palimpsest \
    PALIMPSEST_LOG_FORMAT=json
COPY --chmod=0444 deploy/health.py /opt/health.py

# Dependencies of the API, in a folder that is copied as a whole. They change less often than the code, so they come first.
FROM base AS api-needs
WORKDIR /build
RUN python -m venv --without-pip /opt/palimpsest
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > api.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/palimpsest/bin/python install -c constraints.txt -r api.txt

# Additional dependencies of a worker.
FROM api-needs AS worker-needs
ARG TORCH_INDEX=""
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['worker'], sep='\n')" > worker.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/palimpsest/bin/python install -c constraints.txt \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r api.txt -r worker.txt

# The code and the shipped GPT as one wheel.
FROM base AS wheel
WORKDIR /build
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt pip wheel --no-deps --wheel-dir /dist .

FROM base AS api
COPY --from=api-needs /opt/palimpsest /opt/palimpsest
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip --python /opt/palimpsest/bin/python install --no-deps --no-cache-dir /dist/*.whl
LABEL org.opencontainers.image.title="Palimpsest API" \
      org.opencontainers.image.description="The HTTP door of Palimpsest: locates, edits and rolls back facts inside a resident GPT model"
ENV PALIMPSEST_HOST=0.0.0.0 \
    PALIMPSEST_PORT=8000
USER 10001:10001
WORKDIR /var/lib/palimpsest
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=90s --retries=3 \
    CMD ["python", "/opt/health.py", "8000"]
ENTRYPOINT ["palimpsest"]
CMD ["api"]

FROM base AS worker
COPY --from=worker-needs /opt/palimpsest /opt/palimpsest
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip --python /opt/palimpsest/bin/python install --no-deps --no-cache-dir /dist/*.whl
LABEL org.opencontainers.image.title="Palimpsest worker" \
      org.opencontainers.image.description="A worker of Palimpsest: holds the model, computes edits and traces, serves generation"
# The first volume holds statistics of keys, the second models from a hub. Both can be created again.
ENV HF_HOME=/var/cache/palimpsest \
    PALIMPSEST_METRICS_HOST=0.0.0.0 \
    PALIMPSEST_METRICS_PORT=9464
VOLUME ["/var/lib/palimpsest", "/var/cache/palimpsest"]
USER 10001:10001
WORKDIR /var/lib/palimpsest
EXPOSE 9464
# A large model takes minutes to load, and longer at the first start, which downloads it and collects statistics.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30m --retries=4 \
    CMD ["python", "/opt/health.py", "9464"]
ENTRYPOINT ["palimpsest"]
CMD ["worker"]
