# Prints the commands of a stage of the Catch study, one plan for each target game, since games have budgets of their
# own (a pilot: from scratch DQN reaches .9 of a ceiling of .97 in 20,000 steps of Catch-v0 and v3, .8 of .90 in
# 40,000 of v1, .88 of .97 in 48,000 of v2). From a folder with the scripts and catch_env.py:
#
#   bash plan.sh ddqn_atari.py dqn_atari "--no-double" source "1 2 3" 0 1 2 3 > jobs.txt
#   OMP_NUM_THREADS=1 xargs -d '\n' -P 2 -I{} sh -c '{}' < jobs.txt
#
# and the same with the stages transfer, self-transfer, hybrid, and for Catch-v4 with `source` and `transfer` on game 4.
# DDQN: bash plan.sh ddqn_atari.py ddqn_atari "" ..., without Catch-v2 to itself (which no seed learns from scratch).
# DQV: bash plan.sh dqv_atari.py dqv_atari "" ..., with Catch-v2 from scratch and as a source, not as a target.
# Then: python transfer_matrix.py table --logdir runs > table.md; python transfer_matrix.py plot --logdir runs --out .
script=$1 exp=$2 extra=$3 stage=$4 seeds=$5
shift 5
base="$extra --exp-name $exp --learning-starts 1000 --train-frequency 8 --learning-rate 1e-3"
base="$base --target-network-frequency 200"
for game in "$@"; do
  case $game in
    2) budget="--total-timesteps 48000 --eval-frequency 2000" ;;
    1 | 4) budget="--total-timesteps 40000 --eval-frequency 2000" ;;
    *) budget="--total-timesteps 20000 --eval-frequency 1000" ;;
  esac
  games="catch_env:Catch-v0 catch_env:Catch-v1 catch_env:Catch-v2 catch_env:Catch-v3"
  [ "$game" = 4 ] && games="catch_env:Catch-v0 catch_env:Catch-v4"
  python transfer_matrix.py plan --script "$script" --stage "$stage" --env-ids $games \
    --targets catch_env:Catch-v$game --seeds $seeds --args "$base $budget" --source-args "$base"
done
