#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the CPU image and tries it: by itself as any user, then with Prometheus in compose
# under load, and stopped while it answers. Ends with what docs/deploying.md tells of this.
#   scripts/try_compose.sh            everything; takes away what it made, but the image
#   scripts/try_compose.sh STEP...    of: build alone up load rules stop again down
# From the environment, besides what deploy/compose.yaml and the Dockerfile take:
#   COMPOSE        docker compose
#   OVERRIDES      further compose files, for what is peculiar to a machine
#   RUN_FLAGS      further flags of `docker run`, for the same
#   LOAD           what to give to `kvserve bench`
set -euo pipefail
cd "$(dirname "$0")/.."

IMAGE=kvserve:0.1.0-cpu
API=http://127.0.0.1:${KVSERVE_PORT:-8000}
PROMETHEUS=http://127.0.0.1:${PROMETHEUS_PORT:-9090}
LOAD=${LOAD:---workload long-document --requests 20 --rate 0.5}
PROJECT=kvserve-try
ALONE=kvserve-alone SERVER=$PROJECT-kvserve-cpu-1 WATCHER=$PROJECT-prometheus-1

compose() {
  local file files=(-f deploy/compose.yaml -f deploy/compose.no-grafana.yaml)
  for file in ${OVERRIDES:-}; do files+=(-f "$file"); done
  ${COMPOSE:-docker compose} --project-name $PROJECT "${files[@]}" --profile cpu "$@"
}

say() { printf '\n== %s\n' "$*"; }

fail() {
  printf 'try_compose: %s\n' "$*" >&2
  exit 1
}

wait_until_healthy() { # CONTAINER SECONDS
  local start=$SECONDS state
  while state=$(docker inspect -f '{{.State.Status}} {{.State.Health.Status}}' "$1"); do
    case $state in
      'running healthy') break ;;
      running*) ((SECONDS - start < $2)) || fail "$1 is not healthy after $2 s" ;;
      *) fail "$1 ended ($state): $(docker logs "$1" 2>&1 | tail -60)" ;;
    esac
    sleep 1
  done
  say "$1 is healthy after $((SECONDS - start)) s"
}

ask() { # TOKENS
  curl -fsS "$API/v1/chat/completions" -H 'Content-Type: application/json' \
    ${KVSERVE_API_KEY:+-H "Authorization: Bearer $KVSERVE_API_KEY"} -d '{
      "model": "SmolLM2-135M-Instruct", "ignore_eos": true, "max_tokens": '"$1"',
      "messages": [{"role": "user", "content": "What is the capital of France?"}]}'
}

expect_paris() {
  local reply
  reply=$(ask 12)
  [[ $reply == *Paris* ]] || fail "asked for the capital of France, it said: $reply"
}

expect_exit() { # CONTAINER
  local code
  code=$(docker inspect -f '{{.State.ExitCode}}' "$1")
  [ "$code" = 0 ] || fail "$1 ended with exit code $code: $(docker logs "$1" 2>&1 | tail -60)"
}

build() {
  local start=$SECONDS
  compose build kvserve-cpu
  say "built in $((SECONDS - start)) s: $(docker image inspect -f '{{.Size}}' $IMAGE |
    awk '{printf "%.2f GB", $1 / 1e9}')"
}

# As charts and OpenShift run it: `vllm serve`, a user id that the image knows nothing of,
# in group 0.
alone() {
  docker rm -fv $ALONE >/dev/null 2>&1 || true
  # shellcheck disable=SC2086
  docker run -d --name $ALONE --user 12345:0 --read-only --cap-drop ALL \
    --security-opt no-new-privileges --shm-size 1g -v /var/cache/kvserve \
    --tmpfs /tmp:exec,mode=1777 --tmpfs /home/kvserve:exec,mode=1777 \
    -p "127.0.0.1:${KVSERVE_PORT:-8000}:8000" ${RUN_FLAGS:-} --entrypoint vllm \
    $IMAGE serve SmolLM2-135M-Instruct --host 0.0.0.0 --port 8000 \
    --kv-cache-memory-bytes "${KVSERVE_KV_MEMORY:-1G}" >/dev/null
  wait_until_healthy $ALONE 900
  expect_paris
  docker stop -t 60 $ALONE >/dev/null
  expect_exit $ALONE
  docker logs $ALONE 2>&1 | tail -40 | cut -c1-200
  docker rm -fv $ALONE >/dev/null
}

up() {
  compose up -d
  wait_until_healthy $SERVER 900
  wait_until_healthy $WATCHER 60
  docker stats --no-stream
  expect_paris
}

load() {
  # shellcheck disable=SC2086
  compose run --rm loadtest $LOAD
  docker stats --no-stream
}

# What each recording rule has recorded, at its peak; then alerts.
rules() {
  local name answer
  sleep 20 # one more scrape, and one more evaluation
  for name in $(sed -nE 's/^ *- record: //p' deploy/prometheus/rules/*.yml); do
    answer=$(curl -fsSG "$PROMETHEUS/api/v1/query" \
      --data-urlencode "query=max_over_time($name[1h])")
    [[ $answer =~ \"value\":\[[0-9.]+,\"([0-9.e+-]+)\"\] ]] || fail "$name: $answer"
    printf '%-55s %s\n' "$name" "${BASH_REMATCH[1]}"
  done
  curl -fsS "$PROMETHEUS/api/v1/alerts"
  echo
}

# A reply that runs when everything is told to stop must be whole, or on a slow machine
# what there is of it when --shutdown-timeout is over.
stop() {
  local start took reply end
  reply=$(mktemp)
  ask 512 >"$reply" &
  sleep 3
  start=$SECONDS
  compose stop
  took=$((SECONDS - start))
  wait $! || fail "the reply that ran was cut off"
  end=$(grep -oE '"finish_reason":"[a-z]+"' "$reply" | cut -d'"' -f4)
  [ "$end" = length ] || [ "$end $((took >= 60))" = 'abort 1' ] ||
    fail "after $took s it ended as $end: $(cat "$reply")"
  say "stopped in $took s; the reply that ran has $(grep -oE '"completion_tokens":[0-9]+' \
    "$reply" | cut -d: -f2) of 512 tokens"
  rm "$reply"
  expect_exit $SERVER
  expect_exit $WATCHER
}

# The volume holds the kernels that the first start compiled.
again() {
  compose up -d
  wait_until_healthy $SERVER 900
  expect_paris
}

down() { compose down --volumes --remove-orphans; }

steps=("$@")
((${#steps[@]})) || {
  steps=(build alone up load rules stop again down)
  trap 'docker rm -fv $ALONE >/dev/null 2>&1; down' EXIT
}
for step in "${steps[@]}"; do
  case $step in
    build | alone | up | load | rules | stop | again | down) ;;
    *) fail "no such step: $step; there are build alone up load rules stop again down" ;;
  esac
done
for step in "${steps[@]}"; do
  say "$step"
  "$step"
done
