# A study of three games, and of transfer between them, on one GPU, from the repository's root:
#
#   bash results/atari/study.sh
#
# DQN, DDQN, DQV and DQV-Max learn Pong, Boxing and Enduro from scratch; then the networks of Boxing and Enduro are
# transferred to Pong, by fine-tuning and with frozen features; tables, scores and curves (beside the author's) go to
# results/atari/. The same command continues a study that was stopped, and LIMIT stops it (in seconds; the runs write
# their checkpoints):
#
#   LIMIT=570 STEPS=2000000 SEEDS="1 2" PARALLEL=4 bash results/atari/study.sh
set -u
STEPS=${STEPS:-2000000} SEEDS=${SEEDS:-1 2 3} PARALLEL=${PARALLEL:-4} LIMIT=${LIMIT:-1000000} FLAGS=${FLAGS:-}
LOGDIR=${LOGDIR:-runs/atari} OUT=${OUT:-results/atari} GAMES=${GAMES:-Pong Boxing Enduro}
TARGETS=${TARGETS:-${GAMES%% *}}
export OMP_NUM_THREADS=1
begun=$SECONDS
ids() { for game in "$@"; do echo "ALE/$game-v5"; done; }
plan() {  # SCRIPT NAME FLAGS STAGE: the commands of a stage that are not complete yet
  python transfer_matrix.py plan --logdir "$LOGDIR" --script "$1" --stage "$4" --env-ids $(ids $GAMES) --seeds $SEEDS \
    --args="$3 --exp-name $2 --total-timesteps $STEPS --eval-frequency $((STEPS / 20)) $FLAGS" "${@:5}"
}
stage() {  # STAGE ...: of all algorithms
  { plan ddqn_atari.py dqn_atari --no-double "$@" && plan ddqn_atari.py ddqn_atari "" "$@" \
    && plan dqv_atari.py dqv_atari "" "$@" && plan dqv_max_atari.py dqv_max_atari "" "$@"; } > "$LOGDIR/$1.txt" \
    || exit 1
  left=$((LIMIT - (SECONDS - begun)))
  [ $left -gt 0 ] || { echo "time is up before --stage $1; the same command goes on"; exit 1; }
  [ -s "$LOGDIR/$1.txt" ] || return 0
  tr '\n' '\0' < "$LOGDIR/$1.txt" | timeout $left xargs -0 -n 1 -P "$PARALLEL" sh -c \
    || { echo "--stage $1 was stopped; the same command goes on"; exit 1; }
}
mkdir -p "$LOGDIR" "$OUT"
stage source
stage transfer --targets $(ids $TARGETS)
stage only-head --targets $(ids $TARGETS)
for format in markdown csv; do
  python transfer_matrix.py table --logdir "$LOGDIR" --format $format > "$OUT/table.$format" \
    || rm "$OUT/table.$format"  # a single game has no transfers to compare; that is said
done
python transfer_matrix.py scores --logdir "$LOGDIR" > "$OUT/scores.markdown" \
  && python transfer_matrix.py plot --logdir "$LOGDIR" --out "$OUT" || exit 1
for game in $GAMES; do  # from scratch, beside the author's own curves
  author="results/atari/author/$(echo "$game" | tr '[:upper:]' '[:lower:]')_results.txt"
  python results/atari/returns.py "$OUT/$game.png" "$author" "$LOGDIR/ALE-$game-v5__"*
done || exit 1
echo "$((SECONDS - begun)) seconds in this call, $(ls "$LOGDIR"/*/*.pt | wc -l) runs in $LOGDIR"
