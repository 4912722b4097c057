#!/usr/bin/env bash
# The comparison of docs/results: every method on drawn scenes at equal cost, on the bundled model. About three hours on one core; a rerun goes on.
#
#   bench/compare_shapes.sh ANSWERS REPORT [SEED]
#
# ANSWERS keeps every answer and what was tuned; REPORT gets the tables and plots, k1/ (all methods prune from layer 1 on, three costs),
# k3/ (from layer 3 on, as in the papers), reducers/ (reducers before the language model, alone and with policies) and pool/ (retention
# pool beside the others, one cost). A SEED other than 0 asks about other scenes, and says which scores of docs/results come out again.
set -euo pipefail
answers=${1:?usage: compare_shapes.sh ANSWERS REPORT [SEED]} report=${2:?usage: compare_shapes.sh ANSWERS REPORT [SEED]} seed=${3:-0}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
trained=docs/results/predictors

compare() { # NAME POLICIES ALSO COSTS
  local against=()
  [ "$seed" = 0 ] || against=(--against "docs/results/$1/shapes.json")
  python -m dyrate_kernels.cli.main eval --seed "$seed" --scenes 150 --batch-size 50 --tasks describe,colour,shape \
    --policies "$2" --also "$3" --cost "$4" --leave-out --out "$answers/$1-seed$seed" --report "$report/$1" "${against[@]}"
}

compare k1 "dyrate, dyrate:predictor=trained@evict as dyrate@evict, dyrate:predictor=$trained/low as dyrate-low,
  dyrate:predictor=$trained/mass as dyrate-mass, dyrate:k=1:predictor=closed-form as dyrate-closed,
  dyrate:k=1:predictor=closed-form@evict as dyrate-closed@evict, fastv:k=1 as fastv, fastv:k=1@evict as fastv@evict, fixed:k=1 as fixed,
  fixed:k=1@evict as fixed@evict, depth:k=1@evict as depth@evict, vtw@evict, pyramiddrop:k=1@evict as pyramiddrop@evict,
  sparsevlm:k=1@evict as sparsevlm@evict, dycoke:k=1 as dycoke, st3:k=1 as st3, threshold:k=1 as threshold, layerwise:k=1 as layerwise,
  random:k=1 as random, random:k=1@evict as random@evict, uniform:k=1 as uniform, uniform:k=1@evict as uniform@evict,
  recycle:policy=(uniform:k=1) as recycle-uniform, klguard:policy=(uniform:k=1) as klguard-uniform, downsample" \
  "dyrate as dyrate-untuned, fastv:k=3:rate=0.5@evict as fastv-k3-r50@evict, vtw:k=4@evict as vtw-k4@evict" 57.9,33.3,20

compare k3 "dyrate:predictor=$trained/mass-k3 as dyrate-mass, dyrate:predictor=$trained/mass-k3-spread as dyrate-mass-spread,
  dyrate:k=3:predictor=closed-form as dyrate-closed, fastv:k=3 as fastv, fastv:k=3@evict as fastv@evict, fixed:k=3 as fixed,
  depth:k=3@evict as depth@evict, pyramiddrop:k=3@evict as pyramiddrop@evict, sparsevlm:k=3@evict as sparsevlm@evict, dycoke:k=3 as dycoke,
  st3:k=3 as st3, threshold:k=3 as threshold, layerwise:k=3 as layerwise, random:k=3 as random, random:k=3@evict as random@evict,
  uniform:k=3 as uniform, uniform:k=3@evict as uniform@evict" "" 57.9

compare reducers "dyrate, none+fastervlm as +fastervlm, none+hired as +hired, none+visionzip as +visionzip, none+prumerge as +prumerge,
  none+tome as +tome, none+aim as +aim, none+divprune as +divprune, none+downsample as +downsample, none+random as +random,
  none+uniform as +uniform, aim@evict as aim@evict, dyrate+aim:keep=0.75 as dyrate+aim, dyrate+downsample:keep=0.75 as dyrate+downsample,
  uniform:k=1+aim:keep=0.75 as uniform+aim" "aim:k=2:end=4+aim:keep=0.75@evict as aim+aim-untuned@evict" 57.9,33.3

compare pool "dyrate, dyrate:predictor=trained@evict as dyrate@evict, dyrate@pool=0.5, dyrate@pool=0.5:by=uniform, fixed:k=1 as fixed,
  fixed:k=1@evict as fixed@evict, fixed:k=1@pool=0.5 as fixed@pool=0.5" "" 33.3
