# How the files in this folder were made, from a folder with lottery_ticket.py and no other runs in it. Data: clothes,
# six classes of Fashion-MNIST with 600 images each (the source), and shoes-and-bags, the other four with 100 each (a
# natural target), by make_data.py from Debian's dataset-fashion-mnist; openclipart, 1,129 pictures in 10 classes of
# Debian's openclipart-png, openclipart10 of ../classify/make_data.py (a non-natural target).
export OMP_NUM_THREADS=1
lottery() { python lottery_ticket.py "$@"; }
for seed in 1 2 3; do
  common="--image-size 24 --workers 0 --learning-rate 0.02 --rounds 9 --seed $seed"
  train="$common --epochs 16 --milestones 11 14 --patience 0"
  new="--arch conv --prune-fraction 0.44"
  tickets="--tickets runs/clothes__lottery_ticket__conv__own-global__$seed"
  lottery --dataset folder:clothes $common $new --epochs 12 --milestones 8 10
  for target in openclipart shoes-and-bags; do
    lottery --dataset folder:$target $train --arch conv --control dense
    lottery --dataset folder:$target $train $tickets
    lottery --dataset folder:$target $train $new
    for control in reinit random-mask trained; do
      lottery --dataset folder:$target $train $tickets --control $control
    done
  done
  own="--tickets runs/openclipart__lottery_ticket__conv__own-global__$seed"
  lottery --dataset folder:openclipart $train $own --control reinit
  for fraction in 0.75 0.5 0.25; do lottery --dataset folder:openclipart $train $new --train-fraction $fraction; done
done
python lottery_ticket.py --report runs --out pictures > results/lottery/report.md
python results/lottery_study.py results/lottery/study runs >> results/lottery/report.md
# 51 runs: 64 minutes of training on one core of a Xeon with AMX
