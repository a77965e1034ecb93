# Prints the commands of a stage of the Catch study, one plan for each target game, since games have budgets of their
# own (pilots: from scratch DQN reaches .9 of a ceiling of .97 in 20,000 steps of Catch-v0 and v3, .8 of .90 in 40,000
# of v1). Catch-v2 draws a new background in each episode, and a network with few of them learns them by heart: DDQN
# reaches .95 in 130,000 steps with an update every 8, and .93 in 256,000 with one every 32 in 0.6 of the time. From a
# folder with the scripts and catch_env.py:
#
#   bash plan.sh ddqn_atari.py dqn_atari "--no-double --bf16" source "1 2 3" 0 1 3 > jobs.txt
#   tr '\n' '\0' < jobs.txt | OMP_NUM_THREADS=1 xargs -0 -n 1 -P 2 sh -c
#
# and the same with the stages transfer, self-transfer, hybrid, and for Catch-v4 with `source` and `transfer` on game 4.
# With Catch-v2: GAMES="0 1 2 3" bash plan.sh ... 0 1 2 3. DDQN: ddqn_atari.py ddqn_atari ""; DQV: dqv_atari.py dqv_atari ""
# Then: python transfer_matrix.py table --logdir runs > table.md; python transfer_matrix.py plot --logdir runs --out .
script=$1 exp=$2 extra=$3 stage=$4 seeds=$5
shift 5
common="$extra --exp-name $exp --learning-rate 1e-3"
for game in "$@"; do
  schedule="--learning-starts 1000 --train-frequency 8 --target-network-frequency 200"
  case $game in
    2)
      schedule="--num-envs 16 --learning-starts 4000 --train-frequency 32 --target-network-frequency 800"
      budget="--total-timesteps 256000 --eval-frequency 8000"
      ;;
    1 | 4) budget="--total-timesteps 40000 --eval-frequency 2000" ;;
    *) budget="--total-timesteps 20000 --eval-frequency 1000" ;;
  esac
  games=$(printf "catch_env:Catch-v%s " ${GAMES:-0 1 3})
  [ "$game" = 4 ] && games="catch_env:Catch-v0 catch_env:Catch-v4"
  python transfer_matrix.py plan --script "$script" --stage "$stage" --env-ids $games \
    --targets catch_env:Catch-v$game --seeds $seeds --args="$common $schedule $budget" --source-args="$common"
done
