#!/bin/sh
# Before a commit or an upload: MODEL=chatglm3-6b OUT=chatglm3-6b-int4 sh check.sh
set -e
[ -d "$OUT" ] || glmquant convert $MODEL $OUT --fit 6GiB --context 2048
glmquant check $OUT --vram 6GiB --context 2048
