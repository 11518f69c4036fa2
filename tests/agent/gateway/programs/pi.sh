#!/bin/sh
# pi against a gateway: turntrace run tasks.jsonl --agent './pi.sh {prompt}' ...
# CONTEXT_WINDOW: tokens after which it compacts its context.
HOME=$(mktemp -d) && export HOME && trap 'rm -rf "$HOME"' EXIT
mkdir -p "$HOME/.pi/agent"
cat > "$HOME/.pi/agent/models.json" <<END
{
  "providers": {
    "turntrace": {
      "baseUrl": "$OPENAI_BASE_URL",
      "apiKey": "$OPENAI_API_KEY",
      "api": "openai-completions",
      "models": [
        {
          "id": "m",
          "name": "m",
          "input": ["text"],
          "contextWindow": ${CONTEXT_WINDOW:-200000},
          "maxTokens": 4096,
          "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0}
        }
      ]
    }
  }
}
END
export PI_OFFLINE=1
pi -p --provider turntrace --model m "$1"
