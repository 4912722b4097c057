#!/usr/bin/env bash
# The files of a release, from the last commit, and a try of each in an empty environment (docs/release.md). Nothing is published.
#
#   tools/release.sh OUT [PYTHON ..]
#
# OUT gets the source archive, the pure wheel, one wheel with the CUDA extension for each PYTHON (default: python3) where there is nvcc, and
# SHA256SUMS. DYRATE_CUDA_ARCHS (default: all) is what the extension is built for; DYRATE_CUDA=0 leaves it out, DYRATE_CUDA=1 insists on it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "release: $*" >&2
  exit 1
}

[ $# -ge 1 ] || fail "give a folder for the files: tools/release.sh OUT [PYTHON ..]"
mkdir -p "$1"
out=$(cd "$1" && pwd)
[ -z "$(ls -A "$out")" ] || fail "$out is not empty"
shift
[ $# -gt 0 ] || set -- python3
[ -z "$(git -C "$root" status --porcelain)" ] || fail "the checkout has changes that are not committed"
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/dyrate_kernels/__init__.py")
grep -q "^## $version - " "$root/CHANGELOG.md" || fail "CHANGELOG.md has no heading '## $version - DATE'"
grep -qx "version: $version" "$root/CITATION.cff" || fail "CITATION.cff has another version than $version"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/source"
git -C "$root" archive HEAD | tar -x -C "$work/source"

for python in "$@"; do
  "$python" -m venv "$work/build"
  "$work/build/bin/pip" install -q build
  if [ ! -e "$out/dyrate_kernels-$version.tar.gz" ]; then # the wheel is built from the archive: what that lacks shows
    DYRATE_CUDA=0 DYRATE_CUDA_ARCHS='' "$work/build/bin/python" -m build -o "$out" "$work/source"
    mkdir "$work/archive"
    tar -xzf "$out/dyrate_kernels-$version.tar.gz" -C "$work/archive" --strip-components 1
  fi
  if [ "${DYRATE_CUDA:-}" = 1 ] || { [ "${DYRATE_CUDA:-}" != 0 ] && { command -v nvcc || [ -n "${CUDACXX:-}${CUDA_HOME:-}" ]; } >/dev/null; }; then
    DYRATE_CUDA=1 DYRATE_CUDA_ARCHS=${DYRATE_CUDA_ARCHS:-all} "$work/build/bin/python" -m build --wheel -o "$out" "$work/archive"
  fi
  rm -rf "$work/build"
done
(cd "$out" && sha256sum ./*.tar.gz ./*.whl >SHA256SUMS)

try() { # PYTHON FILE: installed as a user does, and used outside of any checkout
  echo "release: trying $(basename "$2") with $("$1" --version)"
  rm -rf "$work/elsewhere"
  mkdir "$work/elsewhere"
  local venv="$work/venv-${1//\//-}" # what it depends on is installed once for each PYTHON
  [ -e "$venv" ] || "$1" -m venv "$venv"
  cp "$work/source/examples/shapes_1.png" "$work/elsewhere"
  (
    cd "$work/elsewhere"
    unset PYTHONPATH
    PATH=$venv/bin:$PATH
    pip uninstall -q -y dyrate-kernels 2>&1 | grep -v 'not installed' || true
    DYRATE_CUDA=0 pip install -q "$2"
    [ "$(dyrate --version)" = "dyrate $version" ] || fail "$2 installs $(dyrate --version)"
    python -c "import dyrate_kernels; print(dyrate_kernels.__file__)"
    dyrate info
    dyrate generate --image shapes_1.png --plot kept.png
    [ -s kept.png ] || fail "$2: the first command drew nothing"
  )
}

try "$1" "$out/dyrate_kernels-$version-py3-none-any.whl"
try "$1" "$out/dyrate_kernels-$version.tar.gz"
for python in "$@"; do
  tag=cp$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])')
  for wheel in "$out/dyrate_kernels-$version-$tag-"*.whl; do
    [ ! -e "$wheel" ] || try "$python" "$wheel"
  done
done
echo "release: $version is in $out"
