# An image that trains as an ordinary user: its entry point is `dptrain`, runs are kept in the volume /home/dptrain/runs.
#
# Who builds it: anybody with Docker or Podman, in the checkout.
#
#   docker build -t dptrain .                                             torch as the package index has it (CUDA on x86)
#   docker build -t dptrain --build-arg DEVICE=cpu --build-arg TORCH_INDEX=... .     a smaller image without CUDA;
#                                                                         ... is the index of torch's CPU builds
#
#   docker run --gpus all --shm-size 8g -v "$PWD/runs:/home/dptrain/runs" dptrain train --task digits
#   docker run --shm-size 8g -v "$PWD/task.py:/home/dptrain/task.py:ro" … dptrain train --task task.py:build
#   docker run --gpus all --shm-size 8g … dptrain doctor
#
# --shm-size: processes that load samples, and NCCL, share memory in /dev/shm; Docker's 64 MiB are too few.
# Several machines: --network host, and `--entrypoint dptrain-torchrun` with the variables in its first lines.
# What was run for real: hadolint, and the installation with constraints.txt in a fresh environment of Python 3.11.
# Not run: a build by Docker, the health check, GPUs.

# The Python that constraints.txt was tested with.
FROM python:3.11-slim

# cuda or cpu: what the torch in the image must be built for; the build fails where it is not.
ARG DEVICE=cuda
# Package index for torch alone; empty takes the usual one.
ARG TORCH_INDEX=""

RUN useradd --create-home --uid 1000 dptrain

WORKDIR /src
COPY constraints.txt ./
# First and on its own: the largest layer by far, and the one that seldom changes.
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
    && python -c "import sys, torch; built = 'cuda' if torch.version.cuda else 'cpu'; \
sys.exit(built != '$DEVICE' and f'DEVICE is $DEVICE, but this torch {torch.__version__} is built for {built}: set TORCH_INDEX')"

COPY pyproject.toml README.md LICENSE ./
COPY dptrain ./dptrain
RUN pip install --no-cache-dir -c constraints.txt '.[train,report,wandb,tasks]' && rm -rf /src/*
COPY launch/torchrun.sh /usr/local/bin/dptrain-torchrun

# A number, so that a cluster which demands "not root" can see that it is not.
USER 1000
WORKDIR /home/dptrain
# Made by the user before it becomes a volume, so that a fresh volume is writable.
RUN mkdir runs
VOLUME /home/dptrain/runs

# A run writes heartbeat.json while it trains, and removes it at its end. Unhealthy is a heartbeat of this container
# (newer than its hostname file) that stopped ten minutes ago. No heartbeat is a start-up, or another command.
HEALTHCHECK --interval=60s --start-period=300s CMD ["sh", "-c", "\
    [ -z \"$(find runs -name heartbeat.json -newer /etc/hostname)\" ] || \
    [ -n \"$(find runs -name heartbeat.json -mmin -10)\" ]"]

ENTRYPOINT ["dptrain"]
CMD ["train"]
