# A small image that trains the default task as an ordinary user. Runs are kept in the volume /home/dptrain/runs.
#
#   docker build -t dptrain .
#   docker run --gpus all -v "$PWD/runs:/home/dptrain/runs" dptrain        (no GPU: without --gpus all)
#
# For a smaller image without CUDA pass the index of torch's CPU builds: --build-arg PIP_EXTRA_INDEX_URL=...
FROM python:3.12-slim

ARG PIP_EXTRA_INDEX_URL=""

RUN useradd --create-home --uid 1000 dptrain

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY dptrain ./dptrain
RUN pip install --no-cache-dir -c constraints.txt . && rm -rf /src/*

# A number, so that a cluster which demands "not root" can see that it is not.
USER 1000
WORKDIR /home/dptrain
# Made by the user before it becomes a volume, so that a fresh volume is writable.
RUN mkdir runs
VOLUME /home/dptrain/runs

CMD ["dptrain", "train"]
