-- Every series that has come to rest goes to the node on one association; the node's own results stay here.
function OnStableSeries(seriesId, tags, metadata)
  if tags['Manufacturer'] ~= 'dicom-node' then
    RestApiPost('/modalities/node/store', '{"Resources": ["' .. seriesId .. '"], "Synchronous": false}')
  end
end
