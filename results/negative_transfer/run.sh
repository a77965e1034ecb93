# Trains the runs of a seed of the study of negative transfer, one after the other; what is complete is skipped:
#
#   OMP_NUM_THREADS=1 bash results/negative_transfer/run.sh SEED [ARMS [MODES [GAMES]]]
#
# Arms are folders of runs/negative: `correct`; `no_terminal`, in which neither the source nor the target has terminal
# transitions; `source_only` and `target_only`, in which only that one has none; `long_correct` and `long_no_terminal`,
# of twice the length; `slow_correct` and `slow_target` (without terminals), whose target network is copied a tenth as
# often; and as `no_terminal` but for one thing, `frozen_target` (never copied), `rmsprop` (the optimiser), `each_step`
# (an update a step), `explore` (epsilon falls over half of the steps), `long_source` (sources learn thrice as long;
# targets are compared with the scratch runs of `no_terminal`). Modes: `fine-tuning` is `between` different games and
# of a game to itself, `only-head` of a game to itself.
# glibc keeps freed memory: a tenth of the time
export MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_MMAP_THRESHOLD_=2000000000
trap 'exit 130' INT TERM
seed=$1
arms=${2:-correct no_terminal source_only target_only}
modes=${3:-"scratch fine-tuning only-head"}
games=${4:-"0 3"}
flags="--no-double --narrow 4 --learning-rate 1e-3 --learning-starts 1000
  --eval-frequency 2000 --eval-episodes 64 --checkpoint-frequency 0 --seed $seed"

train() { # arm, name, target, flags
  folder="runs/negative/$1"
  done="$folder/.$2-$3-$seed"
  [ -e "$done" ] && return
  rm -rf "$folder/catch_env-Catch-v$3__$2__${seed}__"*
  case $1 in *correct | source_only) terminal="" ;; *) terminal="--no-terminal" ;; esac
  case $1 in slow_*) period=5000 ;; frozen_target) period=1000000000 ;; *) period=500 ;; esac
  case $1 in rmsprop) optimizer=rmsprop ;; *) optimizer=adam ;; esac
  case $1 in each_step) frequency=1 ;; *) frequency=4 ;; esac
  case $1 in explore) exploration=0.5 ;; *) exploration=0.1 ;; esac
  case $1/$2 in
    long_source/scratch) steps=108000 exploration=0.0333 ;;
    long_correct/* | long_no_terminal/*) steps=72000 exploration=0.05 ;;
    *) steps=36000 ;;
  esac
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
        [ $mode = fine-tuning ] || { [ $mode = between ] && [ "$game" != "$target" ]; } &&
          train "$arm" "from_v$game" "$target" --pretrained "$run"
        [ $mode = only-head ] && [ "$game" = "$target" ] &&
          train "$arm" "head_v$game" "$target" --pretrained "$run" --freeze-features
      done
    done
  done
done
