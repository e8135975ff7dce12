# One image for every role: SuperLink with its ServerApps, SuperNode with its ClientApps, operator.
#
#   docker build -t atm-fl .                                                    for CPUs
#   docker build -t atm-fl --build-arg TORCH_INDEX=https://pypi.org/simple .    for CUDA, whose libraries PyPI's torch has
# `deploy/refresh base` pins BASE to the digest that its registry has: python:3.11-slim@sha256:…
ARG BASE=python:3.11-slim
FROM ${BASE}

ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore

# Layers from what changes least to what changes most: dependencies by their hashes, torch with what it alone needs by
# their versions (its index has other wheels for CPUs), the project. `pip check` fails if anything is missing.
WORKDIR /app
COPY deploy/requirements.lock deploy/constraints.txt ./
RUN pip install --require-hashes --no-deps --requirement requirements.lock
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url "${TORCH_INDEX}" --constraint constraints.txt torch torchvision
COPY pyproject.toml ./
COPY LICENSE README.md ./
COPY atm_fl atm_fl
COPY server server
COPY clients clients
COPY configs configs
RUN pip install --no-deps --no-build-isolation . && pip check && rm -r build *.egg-info

# Nothing calls home, looks for updates or installs packages at run time.
ENV FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    ATM_FL_CACHE=/var/lib/atm-fl/cache \
    FLWR_HOME=/var/lib/atm-fl/flower \
    MPLCONFIGDIR=/tmp/matplotlib \
    HOME=/tmp \
    USER=atm-fl

# Volumes are mounted on these and take over their mode: any user may write, since the container runs as the one who
# owns the keys on the host (ATM_FL_USER in .env), and as 10001 if nobody says.
RUN mkdir -p /runs /var/lib/atm-fl && chmod 1777 /runs /var/lib/atm-fl
USER 10001:10001

# HEALTH is the address that answers while a role lives: a SuperNode's here, docker-compose.yml sets the SuperLink's.
ENV HEALTH=http://127.0.0.1:9094/health
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=6 \
    CMD ["python", "-c", "import os, urllib.request as web; web.urlopen(os.environ['HEALTH'], timeout=5)"]
CMD ["atm-fl", "--help"]
