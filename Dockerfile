# Train in a container.
#
#   docker build --tag dialogpt-ds --build-arg REVISION="$(git rev-parse HEAD)" .
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 --stop-timeout 60 \
#     --volume "$PWD/shards:/workspace/shards:ro" --volume "$PWD/models:/workspace/models" \
#     dialogpt-ds deepspeed --num_gpus 8 launch/train.py --train_input_file shards/train --output_dir models/chat345 ...
#
# Shared memory: NCCL and the ranks' shared-memory operator need more than Docker's 64 MB of /dev/shm. Use --ipc=host, or
# --shm-size=8g where the host's memory is not to be shared; on Kubernetes an emptyDir with "medium: Memory" on /dev/shm.
# The mounted models folder must be writable for the image's user, UID 1000: --build-arg UID="$(id -u)" makes it yours.
# `docker stop` makes a checkpoint first (launch/stoppable.py), in at most 25 s, or --grace_seconds.
#
# Several machines: --target sshd, see the last but one stage.
#
# To pin a base image by digest: docker buildx imagetools inspect nvidia/cuda:13.0.3-base-ubuntu24.04 prints it, and
# FROM nvidia/cuda:13.0.3-base-ubuntu24.04@sha256:... takes it. The tags below have a patch release and are rarely rebuilt.

# The CUDA release that torch's wheel on PyPI was built with: 13.0 for torch 2.13. CUDA 13 has left GPUs older than Turing.
ARG CUDA=13.0.3
ARG UBUNTU=24.04
# base: torch's wheels bring CUDA's libraries, and the operators that the shipped configurations use are built below.
# devel: with nvcc, some 5 GB more, for operators that DeepSpeed builds on first use (FusedLamb, FusedLion, quantizers).
ARG FLAVOUR=base
# The user that everything runs as.
ARG UID=1000

# What changes least comes first: a new release of this package makes one new layer of a few MB.
FROM nvidia/cuda:${CUDA}-${FLAVOUR}-ubuntu${UBUNTU} AS python
SHELL ["/bin/bash", "-o", "errexit", "-o", "pipefail", "-c"]
# g++ and Python's headers: torch.compile, and DeepSpeed's shared-memory operator of runs on CPUs, compile on first use.
# libaio: NVMe offload. curl: shards over https. pdsh: the deepspeed launcher's way to other hosts.
# Ubuntu's archive keeps the latest release of a package alone: a pinned one can't be installed after its next fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates curl g++ libaio-dev openssh-client pdsh python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ARG UID
# Ubuntu's images come with a user of UID 1000.
RUN if [ "${UID}" -eq 0 ]; then echo "error: --build-arg UID=0: name a user other than root, as 1000" >&2; exit 1; fi \
    && if id ubuntu > /dev/null 2>&1; then userdel --remove ubuntu; fi \
    && groupadd --gid "${UID}" trainer \
    && useradd --no-log-init --create-home --shell /bin/bash --uid "${UID}" --gid trainer trainer \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1
ARG TORCH=2.13.0
# A mirror's settings can be given without a trace in the image: docker build --secret id=pip.conf,src=/etc/pip.conf
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install "torch==${TORCH}"

# A wheel of DeepSpeed with its operators in it. Without them a GPU run compiles for minutes, and needs nvcc.
FROM nvidia/cuda:${CUDA}-devel-ubuntu${UBUNTU} AS operators
SHELL ["/bin/bash", "-o", "errexit", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libaio-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY --from=python /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install "setuptools>=77" "wheel>=0.45" "ninja>=1.11" "packaging>=20" "psutil>=5.9" "py-cpuinfo>=9"
ARG DEEPSPEED=0.19.8
# The processors that the CPU operators are for; DeepSpeed would take the building machine's own, and a run on another end with
# "illegal instruction". x86-64-v3: with AVX2, since 2013 (Intel) and 2015 (AMD). "native": the building machine's own, also on ARM.
ARG CPU_ARCH=x86-64-v3
# The GPUs that the CUDA operators are for, as torch's own wheel: Turing, Ampere, Hopper, Blackwell, and what comes later.
ARG TORCH_CUDA_ARCH_LIST="7.5;8.0;8.6;9.0;10.0;12.0+PTX"
# No GPU is visible while an image is built: without DS_ACCELERATOR, CPU operators would be built, and not be used on a GPU.
# AIO is NVMe offload's. Nor is there a driver: what is linked with it takes the stub of its library.
ENV LIBRARY_PATH=/usr/local/cuda/lib64/stubs \
    DS_ACCELERATOR=cuda \
    DS_BUILD_FUSED_ADAM=1 \
    DS_BUILD_CPU_ADAM=1 \
    DS_BUILD_AIO=1
WORKDIR /tmp/deepspeed
# The two sed lines replace "native" and, since AVX-512 goes with it alone, the width of vectors.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip download --no-deps --no-build-isolation --no-binary deepspeed "deepspeed==${DEEPSPEED}" \
    && tar --extract --gzip --strip-components 1 --file "deepspeed-${DEEPSPEED}.tar.gz" \
    && if [ "${CPU_ARCH}" != native ]; then \
        grep --quiet -- "'-march=native'" op_builder/builder.py \
        && sed --in-place "s/'-march=native'/'-march=${CPU_ARCH}'/; s/\"-march=native\"/\"-march=${CPU_ARCH}\"/" op_builder/builder.py; \
    fi \
    && if [ "${CPU_ARCH}" = x86-64-v3 ]; then sed --in-place "s/'-D__AVX512__'/'-D__AVX256__'/" op_builder/builder.py; fi \
    && pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .
# DeepSpeed leaves out what it could not build, and its build succeeds all the same.
RUN python -m zipfile --list /wheels/*.whl > contents \
    && for operator in fused_adam cpu_adam async_io pin_memory; do \
        grep --quiet "${operator}_op.*\.so" contents || { echo "error: DeepSpeed left ${operator} out" >&2; exit 1; }; \
    done

FROM python AS image
WORKDIR /workspace
# The dependencies alone, so that a change of the code does not install them again.
COPY setup.cfg pyproject.toml LICENSE ./
COPY launch/constraints.txt launch/
COPY dialogpt_ds/__init__.py dialogpt_ds/
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=bind,from=operators,source=/wheels,target=/wheels \
    pip install --constraint launch/constraints.txt /wheels/*.whl --editable ".[demo,tensorboard,dashboard]" \
    && pip check
COPY . .
# The code stays root's; what a run writes goes to a mounted models folder, or to the user's home.
RUN install --directory --owner trainer --group trainer models shards
# The commit, since .git is not in the image: wandb's configuration and `docker inspect` have it.
ARG REVISION=unknown
ENV DIALOGPT_REVISION=${REVISION}
LABEL org.opencontainers.image.title="dialogpt-ds" \
      org.opencontainers.image.description="Train dialogue response models of the GPT-2 family on DeepSpeed" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="${REVISION}"
# A number, since Kubernetes' runAsNonRoot can't tell who a name is.
ARG UID
USER ${UID}
# A signal to the deepspeed command ends it at once, and the end of a container's first process ends all others.
ENTRYPOINT ["/opt/venv/bin/python", "/workspace/launch/stoppable.py"]
CMD ["dialogpt-train", "--help"]

# Several machines: one container of this stage on each, with one key for all of them, then the launcher in the first.
#
#   docker build --target sshd --tag dialogpt-ds:sshd .
#   ssh-keygen -t ed25519 -N "" -f keys/id_ed25519 && cp keys/id_ed25519.pub keys/authorized_keys
#   docker run --detach --name dialogpt --network host --gpus all --ipc=host --ulimit memlock=-1 --stop-timeout 60 \
#     --volume "$PWD/keys:/run/secrets/ssh:ro" --volume /shared/models:/workspace/models ... dialogpt-ds:sshd     # on each host
#   docker exec dialogpt deepspeed --hostfile launch/hostfile ... launch/train.py ...                              # on the first
#
# `docker stop` on any of the hosts ends the whole run with a checkpoint.
FROM image AS sshd
USER 0
# Debian's package makes host keys on installation; everyone who has the image would have them.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-server \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*
# The other containers' keys are as new as the containers. Port 2222: a user other than root can't listen on 22.
RUN printf 'Host *\n    Port 2222\n    StrictHostKeyChecking accept-new\n' > /etc/ssh/ssh_config.d/dialogpt.conf
ARG UID
USER ${UID}
EXPOSE 2222
CMD ["bash", "launch/sshd.sh"]

# Last, so that `docker build .` makes this one.
FROM image AS train
