# How the figures in this folder were made. Data: 260 pictures of 320 x 320 pixels, instruments (Open Clip Art, public
# domain; Noto emoji, Apache-2.0) pasted into 22 old paintings from Debian's gcompris-qt-data, 612 exact boxes of 6
# instruments in COCO's format; 160 to train, 40 for validation, 60 to test, each on paintings of their own.
# mobilenet_v2.pth: ImageNet weights as in results/classify/commands.sh. One core of a 2.5 GHz Xeon for each run.
export OMP_NUM_THREADS=1
detect() {
  name=$1 arch=$2 epochs=$3; shift 3
  python finetune_detect.py --data-dir images --annotations instances_train.json --val-annotations instances_val.json \
    --test-annotations instances_test.json --arch $arch --backbone mobilenet_v2 --weights mobilenet_v2.pth \
    --image-size 192 --workers 0 --optimizer adam --learning-rate 3e-4 --epochs $epochs --exp-name $name "$@"
}
detect ssd-fine-tune ssd 25 --strategy fine-tune
detect ssd-off-the-shelf ssd 25 --strategy off-the-shelf
detect ssd-scratch ssd 25 --strategy scratch
detect fasterrcnn-fine-tune fasterrcnn 15 --strategy fine-tune
for arch in yolov3 fcos retinanet; do detect $arch-fine-tune $arch 15 --strategy fine-tune; done
detect fastrcnn-fine-tune fastrcnn 15 --strategy fine-tune --proposals selective-search
# about a minute an epoch (SSD: a quarter); the folders in runs/ were renamed to paintings__ARM__SEED__TIME
python results/supervised_study.py results/detect/study "AP@0.5,AP@0.1,AP" runs/*
# detections.jpg: eight of the pictures that this writes
python finetune_detect.py --evaluate runs/*__fasterrcnn-fine-tune__*/fasterrcnn-fine-tune.pt --predict images \
  --predict-threshold 0.5
