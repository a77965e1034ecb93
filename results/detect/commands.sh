# How the figures in this folder were made, in November 2026, in an empty runs/detect, one core for each run.
# make_data.py makes the data: 260 pictures of 320 x 320 pixels, instruments of Open Clip Art pasted into 22 old
# paintings of Debian's gcompris-qt-data, with exact boxes in COCO's format; 160 to train, 40 for validation, 60 to
# test, each on paintings of their own; and mobilenet_v2.pth, ImageNet's weights.
mkdir -p runs/detect && cd runs/detect
python ../../results/detect/make_data.py /usr/share
export OMP_NUM_THREADS=1
detect() {
  arch=$1 strategy=$2; shift 2
  python ../../finetune_detect.py --data-dir images --annotations instances_train.json \
    --val-annotations instances_val.json --test-annotations instances_test.json --arch $arch --backbone mobilenet_v2 \
    --weights mobilenet_v2.pth --image-size 192 --workers 0 --optimizer adam --learning-rate 3e-4 --epochs 15 \
    --strategy $strategy --exp-name $arch-$strategy "$@"
}
for strategy in fine-tune off-the-shelf scratch; do detect fasterrcnn $strategy; done
for arch in fcos retinanet yolov3; do detect $arch fine-tune; done
detect fastrcnn fine-tune --proposals proposals.json
# 10 to 14 minutes each; the folders in runs/ were renamed to paintings__ARM__SEED__TIME
python ../../results/supervised_study.py ../../results/detect/study "AP@0.5,AP@0.1,AP" runs/*
# detections.jpg: eight of the pictures that this writes
python ../../finetune_detect.py --evaluate runs/*__fasterrcnn-fine-tune__* --predict images --predict-threshold 0.5
