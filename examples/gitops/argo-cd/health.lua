-- Health of a DeepSpeedFineTune for Argo CD. Healthy while it trains: no sync should wait for hours.
-- It needs none of Lua's libraries that Argo CD opens on request (useOpenLibs).
local status = obj.status or {}

local function stated(kind)
  for _, condition in ipairs(status.conditions or {}) do
    if condition.type == kind then
      return condition
    end
  end
  return {}
end

local function told(health, condition)
  return { status = health, message = condition.message or "" }
end

if obj.metadata.deletionTimestamp ~= nil then
  return { status = "Progressing", message = "It is being deleted: the nodes are freed first" }
end
-- A resource that was never looked at has -1, the default of the custom resource definition.
if status.observedGeneration ~= obj.metadata.generation then
  return { status = "Progressing", message = "The operator has not seen this generation yet" }
end

local ready, stalled = stated("Ready"), stated("Stalled")
if stalled.status == "True" then
  return told("Degraded", stalled)
end
if ready.status == "True" then
  return told("Healthy", ready)
end
-- Both wait for somebody else: the user, or the queue.
if status.phase == "Suspended" or status.phase == "Queued" then
  return told("Suspended", ready)
end
return told("Progressing", ready)
