// Puts the file that was chosen into the text that is submitted, where it can be read and changed first.

async function take(chooser) {
  const [file] = chooser.files;
  if (file) document.getElementById(chooser.dataset.into).value = await file.text();
}

for (const chooser of document.querySelectorAll("input[type=file][data-into]")) {
  chooser.addEventListener("change", () => take(chooser));
  take(chooser); // one may have been chosen before this script ran
}
