#!/usr/bin/env bash
# Everything that a card can tell, in one call of under ten minutes on an H200: kernels, tests, times of ours and of
# others, targets.
#
#   bash scripts/cuda_suite.sh FOLDER [GPT_FAST_FOLDER]           all of it; results and logs go to FOLDER
#   STAGES="tests times" bash scripts/cuda_suite.sh FOLDER        some of it: ceilings tests warm times peers profile pdl
#
# A stage that fails or runs out of time does not stop the others; the last lines say what became of each. Results:
# FOLDER/h200.jsonl (as benchmarks/*.jsonl), FOLDER/tune.jsonl, FOLDER/*.log.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?give a folder for the results}" && cd "$1" && pwd)
gpt_fast=${2:-}
stages=${STAGES:-ceilings tests warm times peers profile pdl}
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$out/cache} TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python}
said=$out/said.log # a line for each stage; a file, as some run beside each other
: >"$said"
limit=${LIMIT:-580} # seconds for all

stage() { # NAME MOST_SECONDS COMMAND...: run it if it is wanted and there is time
  local name=$1 most=$2 start=$SECONDS
  shift 2
  [[ " $stages " == *" $name "* ]] || return 0
  local left=$((limit - SECONDS))
  if ((left < 10)); then echo "$name: no time was left" | tee -a "$said"; return 0; fi
  timeout $((left < most ? left : most)) "$@" >"$out/$name.log" 2>&1
  echo "$name: exit code $?, $((SECONDS - start)) s" | tee -a "$said"
  tail -n 3 "$out/$name.log"
}

warm() { # compile what will be timed, six at once: 32 layers take a minute of one core
  local shape width
  for shape in Llama-3.1-8B Llama-3.2-1B Qwen3.5-4B Llama-2-7B; do
    for width in none int8 int4; do echo $shape $width; done
  done | xargs -P 6 -L 1 bash -c '"$python" -m scripts.benchmark --random_weights $0 --quantize $1 --ours compiled \
    --new_tokens 6 --repeats 1 --warmup 0'
}

times() {
  "$python" -m scripts.benchmark --suite cuda --output "$out/h200.jsonl"
}

peers() { # 8B alone: each peer beside ours, in turns
  local width
  "$python" -m scripts.benchmark --random_weights Llama-3.1-8B --new_tokens 200 --repeats 3 --ours compiled \
    --peers "transformers-eager${gpt_fast:+,gpt-fast}" --gpt_fast "$gpt_fast" --output "$out/h200.jsonl"
  for width in ${gpt_fast:+int8 int4}; do
    "$python" -m scripts.benchmark --random_weights Llama-3.1-8B --new_tokens 200 --repeats 3 --ours compiled \
      --quantize $width --peers gpt-fast --gpt_fast "$gpt_fast" --output "$out/h200.jsonl"
  done
}

profile() {
  "$python" -m scripts.profile_decode --random_weights Llama-3.1-8B
  "$python" -m scripts.profile_decode --random_weights Llama-3.1-8B --quantize int4
}

pdl() { # the same text, and how much sooner, with kernels that begin early
  TORCHINDUCTOR_ENABLE_PDL=1 "$python" -m scripts.benchmark --random_weights Llama-3.1-8B --quantize none,int4 \
    --new_tokens 200 --repeats 3 --ours compiled --output "$out/pdl.jsonl"
}

nvidia-smi >"$out/machine.log" 2>&1
"$python" -c "import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())" \
  | tee -a "$out/machine.log" || exit 2
stage ceilings 100 "$python" -m scripts.tune_cuda --matrices w13 --output "$out/tune.jsonl" # all tiles take longer
export -f warm times peers profile pdl
export python out gpt_fast
stage tests 240 "$python" -m pytest -m cuda -q --durations=10 &
testing=$!
stage warm 200 bash -c warm
wait $testing
stage times 300 bash -c times
stage peers 150 bash -c peers
stage pdl 60 bash -c pdl
stage profile 60 bash -c profile
"$python" -m scripts.targets "$out/h200.jsonl" | tee "$out/targets.log"
echo "in all ${SECONDS} s"
cat "$said"
