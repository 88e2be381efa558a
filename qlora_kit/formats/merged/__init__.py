"""The merged model as a plain safetensors folder in 16 bit."""
