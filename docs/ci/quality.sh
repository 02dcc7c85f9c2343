#!/bin/sh
# Nightly, where there are the model and minutes: refuse a conversion that has drifted too far from its source, on the
# text it is for. MODEL=chatglm3-6b OUT=chatglm3-6b-int4 TEXT=mine.txt sh quality.sh
set -e
[ -d "$OUT" ] || glmquant convert $MODEL $OUT
glmquant check $OUT --max-kld 0.1 --reference $MODEL --text $TEXT --junit quality.xml
