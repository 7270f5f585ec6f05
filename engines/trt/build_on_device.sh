#!/usr/bin/env bash
# Build the TensorRT engine of this bundle on @TITLE@ (sm_@SM@).
#
#   ./build_on_device.sh             the way Foveate itself uses: checked, recorded, signed
#   ./build_on_device.sh --trtexec   the equal trtexec call, for a machine without Python or a C++
#                                    program; writes @PLAN@.trtexec, which Foveate does not load
#   ./build_on_device.sh --print     only print the trtexec call
#
# JetPack 6 (TensorRT 10.3) is told that the graph is strongly typed; from TensorRT 11 on, which
# knows no other kind, the option is left out where trtexec no longer has it.
set -euo pipefail
cd "$(dirname "$0")"

trtexec=$(command -v trtexec || true)
[ -n "$trtexec" ] || trtexec=/usr/src/tensorrt/bin/trtexec

trtexec_line() {
    local typed=()
    if [ ! -x "$trtexec" ] || "$trtexec" --help 2>&1 | grep -q -- --stronglyTyped; then
        typed=(--stronglyTyped)
    fi
    line=("$trtexec" --onnx=@ONNX@ --saveEngine=local/@PLAN@.trtexec "${typed[@]}" --noTF32
@SHAPES@        --memPoolSize=workspace:@WORKSPACE@ --profilingVerbosity=detailed
        --timingCacheFile=local/trtexec.cache --skipInference)
}

case "${1:-}" in
--print)
    trtexec_line
    printf '%q ' "${line[@]}"
    echo
    ;;
--trtexec)
    trtexec_line
    if [ ! -x "$trtexec" ]; then
        echo "error: trtexec is not here. On a Jetson: sudo apt install libnvinfer-bin" >&2
        exit 2
    fi
    mkdir -p local
    "${line[@]}"
    ;;
"")
    if ! python3 -c 'import engines.build' 2>/dev/null; then
        echo "error: Foveate is not installed for python3. Install it:" >&2
        echo "    python3 -m venv --system-site-packages ~/foveate" >&2
        echo "    ~/foveate/bin/pip install 'foveate[tensorrt]'" >&2
        echo "then: PATH=~/foveate/bin:\$PATH ./build_on_device.sh" >&2
        echo "or, without Python: ./build_on_device.sh --trtexec" >&2
        exit 2
    fi
    python3 -m engines.doctor . || true
    exec python3 -m engines.build . --target @TARGET@
    ;;
*)
    sed -n '2,11p' "$0"
    exit 2
    ;;
esac
