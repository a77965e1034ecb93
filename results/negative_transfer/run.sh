# Trains the runs of a seed of the study of negative transfer, one after the other; what is complete is skipped:
#
#   OMP_NUM_THREADS=1 bash results/negative_transfer/run.sh SEED [ARMS [MODES [GAMES]]]
#
# Arms are folders of runs/negative: `correct`; `no_terminal`, in which neither the source nor the target has terminal
# transitions; `source_only` and `target_only`, in which only that one has none; and as `no_terminal` but for one thing,
# `slow_target` (the target network is copied a tenth as often), `frozen_target` (never), `rmsprop` (the optimiser),
# `each_step` (an update a step), `explore` (epsilon falls over half of the steps), `long_source` (sources learn thrice
# as long; their targets are compared with the scratch runs of `no_terminal`).
# glibc keeps freed memory: a tenth of the time
export MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_MMAP_THRESHOLD_=2000000000
trap 'exit 130' INT TERM
seed=$1
arms=${2:-"correct no_terminal source_only target_only slow_target frozen_target rmsprop each_step explore long_source"}
modes=${3:-"scratch fine-tuning only-head"}
games=${4:-"0 3"}
flags="--no-double --narrow 4 --learning-rate 1e-3 --learning-starts 1000
  --eval-frequency 2000 --eval-episodes 64 --checkpoint-frequency 0 --seed $seed"

train() { # arm, name, target, flags
  folder="runs/negative/$1"
  done="$folder/.$2-$3-$seed"
  [ -e "$done" ] && return
  rm -rf "$folder/catch_env-Catch-v$3__$2__${seed}__"*
  case $1 in correct | source_only) terminal="" ;; *) terminal="--no-terminal" ;; esac
  case $1 in slow_target) period=5000 ;; frozen_target) period=1000000000 ;; *) period=500 ;; esac
  case $1 in rmsprop) optimizer=rmsprop ;; *) optimizer=adam ;; esac
  case $1 in each_step) frequency=1 ;; *) frequency=4 ;; esac
  case $1 in explore) exploration=0.5 ;; *) exploration=0.1 ;; esac
  case $1/$2 in long_source/scratch) steps=108000 exploration=0.0333 ;; *) steps=36000 ;; esac
  # shellcheck disable=SC2086 # flags are split
  python ddqn_atari.py --env-id "catch_env:Catch-v$3" --exp-name "$2" --logdir "$folder" $flags $terminal \
    --target-network-frequency $period --optimizer $optimizer --train-frequency $frequency \
    --exploration-fraction $exploration --total-timesteps $steps ${*:4} &&
    touch "$done"
}

for mode in $modes; do
  for arm in $arms; do
    case $arm in target_only) sources=correct ;; source_only) sources=no_terminal ;; *) sources=$arm ;; esac
    for target in $games; do
      [ $mode = scratch ] && [ $arm = $sources ] && train "$arm" scratch "$target"
      for game in $games; do
        run=$(echo "runs/negative/$sources/catch_env-Catch-v${game}__scratch__${seed}__"*)
        [ $mode = fine-tuning ] && train "$arm" "from_v$game" "$target" --pretrained "$run"
        [ $mode = only-head ] && [ "$game" = "$target" ] &&
          train "$arm" "head_v$game" "$target" --pretrained "$run" --freeze-features
      done
    done
  done
done
