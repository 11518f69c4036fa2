#!/bin/sh
# OpenCode against a gateway: turntrace run tasks.jsonl --agent './opencode.sh {prompt}' ...
# CONTEXT_WINDOW: tokens after which it compacts its context.
HOME=$(mktemp -d) && export HOME && trap 'rm -rf "$HOME"' EXIT
mkdir -p "$HOME/.config/opencode"
cat > "$HOME/.config/opencode/opencode.json" <<END
{
  "autoupdate": false,
  "share": "disabled",
  "permission": {"*": "allow"},
  "model": "turntrace/m",
  "small_model": "turntrace/m",
  "provider": {
    "turntrace": {
      "npm": "@ai-sdk/openai-compatible",
      "options": {"baseURL": "$OPENAI_BASE_URL", "apiKey": "$OPENAI_API_KEY"},
      "models": {
        "m": {"tool_call": true, "limit": {"context": ${CONTEXT_WINDOW:-200000}, "output": 4096}}
      }
    }
  }
}
END
export OPENCODE_DISABLE_MODELS_FETCH=1 OPENCODE_DISABLE_LSP_DOWNLOAD=1
export OPENCODE_DISABLE_DEFAULT_PLUGINS=1
opencode run -m turntrace/m "$1"
