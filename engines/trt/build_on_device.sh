#!/usr/bin/env bash
# Build the TensorRT engines of this bundle on @TITLE@ (sm_@SM@).
#
#   ./build_on_device.sh             the way Foveate itself uses: checked, recorded, signed
#   ./build_on_device.sh --trtexec   the equal trtexec call, for a machine without Python or a C++
#                                    program; writes *.plan.trtexec, which Foveate does not load
#   ./build_on_device.sh --print     only print the trtexec call
#
# --stronglyTyped is what JetPack 6 and 7 need (TensorRT 10); TensorRT 11 knows no other kind and
# ignores it.
set -euo pipefail
cd "$(dirname "$0")"

# graph, engine, shapes
graphs=(
@GRAPHS@
)

trtexec=$(command -v trtexec || true)
[ -n "$trtexec" ] || trtexec=/usr/src/tensorrt/bin/trtexec

# Call "$1" with the trtexec call of each graph.
with_each_call() {
    local i
    for ((i = 0; i < ${#graphs[@]}; i += 3)); do
        "$1" "$trtexec" --onnx="${graphs[i]}" --saveEngine="${graphs[i + 1]}" \
            --stronglyTyped --noTF32 ${graphs[i + 2]} \
            --memPoolSize=workspace:@WORKSPACE@ --profilingVerbosity=detailed \
            --timingCacheFile=local/trtexec.cache --skipInference
    done
}

print() {
    printf '%q ' "$@"
    echo
}

case "${1:-}" in
--print)
    with_each_call print
    ;;
--trtexec)
    if [ ! -x "$trtexec" ]; then
        echo "error: trtexec is not here. On a Jetson: sudo apt install libnvinfer-bin" >&2
        exit 2
    fi
    mkdir -p local
    with_each_call env
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
    sed -n '2,10p' "$0"
    exit 2
    ;;
esac
