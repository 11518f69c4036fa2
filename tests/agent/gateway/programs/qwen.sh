#!/bin/sh
# Qwen Code against a gateway: turntrace run tasks.jsonl --agent './qwen.sh {prompt}' ...
# CONTEXT_WINDOW: tokens after which it compacts its context.
HOME=$(mktemp -d) && export HOME && trap 'rm -rf "$HOME"' EXIT
mkdir -p "$HOME/.qwen"
cat > "$HOME/.qwen/settings.json" <<END
{
  "privacy": {"usageStatisticsEnabled": false},
  "general": {"disableAutoUpdate": true, "enableAutoUpdate": false},
  "security": {"auth": {"selectedType": "openai"}},
  "model": {"generationConfig": {"contextWindowSize": ${CONTEXT_WINDOW:-200000}}}
}
END
export OPENAI_MODEL=m QWEN_TELEMETRY_ENABLED=false
qwen --yolo --auth-type openai -m m -p "$1"
